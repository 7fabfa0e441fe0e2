"""Sources of training data: indexed shards and streams keep the same contract; each finds mean and std."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import png

from mae.data.batch import BatchRecipe
from mae.data.images.augment import AugmentSettings
from mae.data.images.decode import decode
from mae.data.loader import load
from mae.data.measuring import measure
from mae.data.plan import plan_batches
from mae.data.prepare import open_shards
from mae.data.settings import DataSettings
from mae.data.source import IndexedSource, Source, StreamedSource, open_source, statistics_of
from mae.data.statistics import INFO_FILE, PixelStatistics
from mae.data.store.shards import expand
from mae.errors import UserError

WHOLE = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
STORED = '{"splits": {"train": {"filenames": ["train-000000.tar"], "mean": [0.25], "std": [0.5]}}}'


class OneSource(NamedTuple):
    """A source of twelve images in three shards, and its settings, with mean and std."""

    folder: Path
    source: Source
    data: DataSettings


@pytest.fixture(params=["indexed", "stream"])
def one(request: pytest.FixtureRequest, make_shards: Callable[..., Path], tmp_path: Path) -> OneSource:
    folder = make_shards([5, 4, 3])
    data = DataSettings(
        shards=(str(folder),), channels=1, image_size=(8,), crop_pct=1.0, mean=(0.5,), std=(0.25,),
        reader=request.param, stream_samples=12, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    return OneSource(folder, open_source(data, lambda text: None), data)


def test_either_source_knows_its_shards_and_the_length_of_an_epoch(one: OneSource) -> None:
    assert [shard.name for shard in one.source.shards] == [f"train-00000{n}.tar" for n in range(3)]
    assert one.source.samples == 12


def test_either_source_makes_batches_of_the_plan_and_the_recipe(one: OneSource) -> None:
    recipe, known = BatchRecipe(0, one.data, WHOLE, noise_columns=3), {png_pixels(n): n for n in range(12)}
    seen: list[list[int]] = []
    for rank in range(2):
        batches = one.source.train_batches(plan_batches(4, 2, None), rank, recipe)
        assert (batches.samples, batches.shards) == (12, one.source.shards)
        assert batches.plan.per_process == 2
        assert batches.fingerprint
        batch = next(load(batches.starting_at(0), range(1), 0))
        assert (batch.images.shape, batch.noise.shape) == ((2, 1, 8, 8), (2, 3))
        assert (batch.bad, batch.lost) == ([], "")
        numbers = [known[bytes(image.contiguous().numpy())] for image in batch.images]
        assert batch.labels.tolist() == [number % 4 for number in numbers]
        seen.append(numbers)
    assert seen[0] != seen[1]


def test_either_source_is_changed_by_other_data(one: OneSource, make_shards: Callable[..., Path]) -> None:
    recipe, plan = BatchRecipe(0, one.data, WHOLE), plan_batches(4, 1, None)
    before = one.source.train_batches(plan, 0, recipe).fingerprint
    again = open_source(one.data, lambda text: None)
    assert again.train_batches(plan, 0, recipe).fingerprint == before
    fewer = replace(one.data, shards=(str(make_shards([5, 4], name="fewer")),))
    assert open_source(fewer, lambda text: None).train_batches(plan, 0, recipe).fingerprint != before


def test_either_source_keeps_statistics_that_are_set_and_takes_stored_ones(one: OneSource) -> None:
    names = [shard.name for shard in one.source.shards]
    stored = {"splits": {"train": {"filenames": names, "mean": [0.1], "std": [0.2]}}}
    (one.folder / INFO_FILE).write_text(json.dumps(stored))
    said: list[str] = []
    assert one.source.with_statistics(one.data, said.append) == one.data
    found = one.source.with_statistics(replace(one.data, mean=None, std=None), said.append)
    assert statistics_of(found) == PixelStatistics((0.1,), (0.2,))
    assert said == []


def test_either_source_gives_fixed_images_and_some_images_by_name(one: OneSource) -> None:
    pixels = [png_pixels(n) for n in range(12)]
    first, again = one.source.fixed_images(4, one.data), one.source.fixed_images(4, one.data)
    assert first.pixels.shape == (4, 1, 8, 8)
    assert torch.equal(first.pixels, again.pixels)
    assert first.ids.tolist() == again.ids.tolist()
    assert len({pixels.index(bytes(image.contiguous().numpy())) for image in first.pixels}) == 4
    assert len(one.source.fixed_images(100, one.data).ids) in (5, 12), "of a stream, the first shard"
    some = list(one.source.some_images(3, one.data))
    assert len(some) == 3
    for name, image in some:
        number = int(name.rpartition(" ")[2].removesuffix(".png"))
        assert image == png(number)
        assert name.startswith(f"{one.folder}/train-00000")


def png_pixels(number: int) -> bytes:
    return bytes(decode(png(number), 1).contiguous().numpy())


def test_a_stream_without_statistics_cannot_measure_them(make_shards: Callable[..., Path]) -> None:
    data = DataSettings(channels=1, reader="stream", stream_samples=5)
    source = StreamedSource(expand([str(make_shards([5]))]), 5)
    with pytest.raises(UserError, match=r"data\.mean and data\.std are not set, and a stream cannot measure them"):
        source.with_statistics(data, lambda text: None)


def test_pictures_are_the_first_good_images(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", {"0.png": b"\x89PNG\r\n\x1a\n", "1.png": png(1), "2.png": png(2), "3.png": png(3)})
    data = DataSettings(image_size=(8,), channels=1, crop_pct=1.0, cache_dir=path.parent / "cache")
    found = StreamedSource(expand([str(path)]), samples=100).fixed_images(2, data)
    assert found.ids.tolist() == [0, 1]
    assert torch.equal(found.pixels, torch.stack([decode(png(n), 1) for n in (1, 2)]))


def test_pictures_of_a_shard_of_bad_images_are_refused(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", {"0.png": b"\x89PNG\r\n\x1a\n"})
    source = StreamedSource(expand([str(path)]), samples=100)
    with pytest.raises(UserError, match=r"x\.tar has no good image; the last: .*x\.tar: 0\.png"):
        source.fixed_images(2, DataSettings(image_size=(8,), channels=1, cache_dir=path.parent))


def resolved(folder: Path, data: DataSettings) -> tuple[DataSettings, list[str]]:
    """The settings with their statistics, and what was said beside the indexing."""
    said: list[str] = []
    index = open_shards((str(folder),), data, lambda text: None)
    return IndexedSource(index).with_statistics(data, said.append), said


def test_statistics_that_are_set_win_over_all_others(
    make_shards: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    folder = make_shards([2])
    (folder / INFO_FILE).write_text(STORED)
    data = data_of(channels=1, mean=(0.1,), std=(0.2,))
    assert resolved(folder, data) == (data, [])


def test_stored_statistics_win_over_those_of_the_index(
    make_shards: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    folder = make_shards([2])
    (folder / INFO_FILE).write_text(STORED)
    found, said = resolved(folder, data_of(channels=3))
    assert statistics_of(found) == PixelStatistics((0.25,) * 3, (0.5,) * 3)
    assert not said


@pytest.mark.parametrize("channels", [1, 3])
def test_without_either_those_of_the_index_are_taken(
    make_shards: Callable[..., Path], data_of: Callable[..., DataSettings], channels: int
) -> None:
    folder, data = make_shards([3, 2]), data_of(channels=channels)
    found, said = resolved(folder, data)
    index = open_shards((str(folder),), data, said.append)
    expected, images = measure(index, data.cache, data.cache_bytes, channels)
    assert images == 5
    assert statistics_of(found) == expected
    assert not said


def test_images_of_other_channels_than_asked_for_are_measured_anew(
    make_shards: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    """Gray made of colour has a mean of its own."""
    folder, data = make_shards([3, 2], mode="RGB"), data_of(channels=1)
    found, said = resolved(folder, data)
    expected, _ = measure(open_shards((str(folder),), data, said.append), data.cache, data.cache_bytes, 1)
    assert statistics_of(found) == expected
    assert not said


def test_that_a_part_was_measured_is_said(write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]) -> None:
    path = write_tar("x.tar", {"a.png": png(0), "b.png": png(1), "c.png": png(2)[:60]})
    found, said = resolved(path, data_of(channels=1))
    expected = f"mean and std were measured on 2 of 3 images ({statistics_of(found)}); "
    assert said == [expected + "`mae pack` and `mae index --check` measure all"]


def test_images_that_cannot_have_the_channels_asked_for_are_refused(
    make_shards: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    data, said = data_of(channels=5), list[str]()
    index = open_shards((str(make_shards([2])),), data_of(channels=1), said.append)
    with pytest.raises(UserError, match=r"no image could be decoded into 5 channels \(data\.channels\)"):
        IndexedSource(index).with_statistics(data, said.append)
    four = statistics_of(IndexedSource(index).with_statistics(data_of(channels=4), said.append))
    assert four.mean[3] == 1  # a gray image has no transparent pixel, whatever its mean
    colour = open_shards((str(make_shards([2], name="colour", mode="RGB")),), data_of(channels=3), lambda text: None)
    with pytest.raises(UserError, match=r"no image could be decoded into 5 channels \(data\.channels\)"):
        IndexedSource(colour).with_statistics(data, said.append)
    assert [text for text in said if "mean" in text] == []
