"""Samples in two sets of shards."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.overlap import shared_samples
from mae.data.reader import ImageReader, Location
from mae.data.settings import DataSettings

DATA = DataSettings(shards=("unused",), channels=1, image_size=(8,))


@pytest.fixture
def indexed(make_shards: Callable[..., Path], tmp_path: Path) -> Callable[..., ShardIndex]:
    """A function that indexes shards of the images `png(0)` to `png(n - 1)`."""

    def make(lengths: list[int], name: str) -> ShardIndex:
        return open_index([str(make_shards(lengths, name=name))], tmp_path / "cache")

    return make


def test_each_shared_image_is_found_once_with_both_names(indexed: Callable[..., ShardIndex]) -> None:
    large, small = indexed([5, 4], "large"), indexed([2, 1], "small")
    found = list(shared_samples(large, small, DATA))
    folders = [Path(index.entries[0].url).parent for index in (large, small)]
    assert found == [
        (f"{folders[0]}/train-000000.tar: {n:06d}.png", f"{folders[1]}/train-{n // 2:06d}.tar: {n:06d}.png")
        for n in range(3)
    ]
    assert list(shared_samples(large, small, DATA, subset=np.array([1, 8]))) == found[1:2]


def test_equal_size_and_crc32_alone_make_no_pair(
    indexed: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among millions of images some have both; here all do."""
    first, second = indexed([6], "first"), indexed([3], "second")
    monkeypatch.setattr("mae.data.overlap._keys", lambda index, ids: np.zeros(len(ids), np.uint64))
    assert [pair.second[-10:] for pair in shared_samples(first, second, DATA)] == [f"{n:06d}.png" for n in range(3)]
    assert list(shared_samples(first, second, DATA, subset=np.array([4, 5]))) == []


def test_no_more_images_are_read_than_the_caller_wants(
    indexed: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, other = indexed([50], "index"), indexed([50], "other")
    reads: list[Location] = []
    original = ImageReader.read

    def counted(self: ImageReader, place: Location) -> bytes:
        reads.append(place)
        return original(self, place)

    monkeypatch.setattr(ImageReader, "read", counted)
    assert len(list(islice(shared_samples(index, other, DATA), 3))) == 3
    assert len(reads) == 6
