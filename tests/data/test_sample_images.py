"""Images by sample id: encoded as they were stored, or decoded once and kept."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import png

from mae.data.images.decode import decode_pixels
from mae.data.index import ShardIndex
from mae.data.sample_images import SampleImages
from mae.data.settings import DataSettings
from mae.errors import BadImageError


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_an_image_is_read_anew_unless_it_is_kept(
    make_shards: Callable[..., Path], index_of: Callable[..., ShardIndex], keep_decoded: bool
) -> None:
    folder = make_shards([3])
    images = SampleImages(index_of(folder), DataSettings(channels=1, image_size=(8,), keep_decoded=keep_decoded))
    (location,) = images.reader.locate(np.array([1]))
    expected = decode_pixels(png(1), 1)
    assert np.array_equal(images.pixels(location), expected)
    if not keep_decoded:
        assert images.get(location) == png(1)
        return
    os.truncate(folder / "train-000000.tar", 0)
    kept = images.get(location)
    assert isinstance(kept, np.ndarray)
    assert np.array_equal(kept, expected)


def test_a_bad_image_is_named_by_shard_and_key(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex]
) -> None:
    path = write_tar("x.tar", {"a.png": png(0), "b.png": png(1)[:60]})
    images = SampleImages(index_of(path), DataSettings(channels=1, image_size=(8,)))
    _, bad = images.reader.locate(np.arange(2))
    with pytest.raises(BadImageError) as caught:
        images.pixels(bad)
    assert images.named(bad, caught.value) == f"{path}: b.png ({caught.value})"
