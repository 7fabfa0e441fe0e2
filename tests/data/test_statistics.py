import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mae.data.statistics import (
    PixelStatistics,
    PixelSums,
    SetPixels,
    for_channels,
    read_info,
    stored_statistics,
)
from mae.data.store.shards import Shard
from mae.errors import UserError

GRAY = PixelStatistics((0.25,), (0.5,))
COLOUR = PixelStatistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def images_of(channels: int, count: int = 7) -> list[Tensor]:
    """Images of different sizes and brightness."""
    rng = np.random.default_rng(channels)
    return [
        torch.from_numpy(rng.integers(0, 40 + 30 * n, (channels, 3 + n, 9 - n), dtype=np.uint8)) for n in range(count)
    ]


def sums_of(images: list[Tensor]) -> PixelSums:
    sums = PixelSums(len(images[0]))
    for image in images:
        sums.add(image)
    return sums


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_mean_and_deviation_equal_those_of_numpy_over_all_pixels(channels: int) -> None:
    images = images_of(channels)
    pixels = np.concatenate([image.flatten(1).numpy() for image in images], axis=1).astype(np.float64) / 255
    found = sums_of(images).statistics()
    assert found.mean == pytest.approx(pixels.mean(axis=1), rel=1e-12)
    assert found.std == pytest.approx(pixels.std(axis=1), rel=1e-12)


def test_a_small_spread_around_a_great_mean_is_exact() -> None:
    image = torch.full((1, 1000, 1000), 250, dtype=torch.uint8)
    image[:, :500] = 254
    assert sums_of([image]).statistics() == PixelStatistics((252 / 255,), (2 / 255,))


def test_the_result_depends_neither_on_the_order_nor_on_who_counted() -> None:
    images = images_of(3)
    whole = sums_of(images).statistics()
    assert sums_of(images[::-1]).statistics() == whole
    one, other = sums_of(images[:2]), sums_of(images[2:])
    one.merge(other)
    assert one.statistics() == whole
    empty = PixelSums(3)
    empty.merge(one)
    assert empty.statistics() == whole


def test_sums_do_not_overflow_64_bits() -> None:
    sums = sums_of([torch.full((1, 1000, 1000), 255, dtype=torch.uint8)])
    for _ in range(60):
        sums.merge(sums)
    assert sums.pixels == 10**6 * 2**60
    assert sums.statistics().mean == (1.0,)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_constant_images_have_a_deviation_to_divide_by(value: int) -> None:
    found = sums_of([torch.full((2, 4, 4), value, dtype=torch.uint8)]).statistics()
    assert found.mean == pytest.approx((value / 255,) * 2)
    assert min(found.std) > 0


def pixels_of(*sets: list[tuple[Tensor, bool]]) -> SetPixels:
    """Images and whether they are gray, counted set by set and merged."""
    whole = SetPixels()
    for images in sets:
        part = SetPixels()
        for image, is_gray in images:
            part.add(image, is_gray)
        whole.merge(part)
    return whole


def test_a_set_of_images_is_counted_with_the_channels_they_have() -> None:
    colour = [(image, False) for image in images_of(3)]
    found = pixels_of(colour[:2], colour[2:])
    assert (found.images, found.statistics()) == (7, sums_of(images_of(3)).statistics())
    five = pixels_of([(image, False) for image in images_of(5)])
    assert five.statistics() == sums_of(images_of(5)).statistics()


def test_a_set_of_gray_images_has_one_mean_and_a_mixed_one_three() -> None:
    gray = [(image.expand(3, -1, -1), True) for image in images_of(1)]
    expected = sums_of(images_of(1)).statistics()
    assert pixels_of(gray).statistics() == expected
    mixed = pixels_of(gray, [(image, False) for image in images_of(3)]).statistics()
    assert mixed is not None
    assert len(mixed.mean) == 3
    one_plane = [(image, True) for image in images_of(1)]
    assert pixels_of(one_plane).statistics() == expected


def test_a_set_of_different_numbers_of_channels_or_of_nothing_has_no_mean() -> None:
    three, five = ([(image, False) for image in images_of(channels)] for channels in (3, 5))
    assert pixels_of(three, five).statistics() is None
    assert pixels_of().statistics() is None


def test_gray_statistics_fit_colour_and_others_their_own_channels() -> None:
    assert for_channels(GRAY, 3) == PixelStatistics((0.25,) * 3, (0.5,) * 3)
    assert for_channels(GRAY, 4) is None
    assert for_channels(COLOUR, 3) == COLOUR
    assert for_channels(COLOUR, 1) is None
    assert for_channels(COLOUR, 4) is None


def shard(path: Path) -> Shard:
    return Shard(str(path), 1, "1")


def folder_of(path: Path, **splits: tuple[list[str], PixelStatistics | None]) -> Path:
    """A folder with the `_info.json` that `mae pack` writes."""
    path.mkdir(exist_ok=True)
    entries: dict[str, Any] = {}
    for name, (filenames, statistics) in splits.items():
        entries[name] = {"name": name, "filenames": filenames}
        if statistics is not None:
            entries[name] |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    (path / "_info.json").write_text(json.dumps({"splits": entries}))
    return path


def test_what_was_stored_beside_the_shards_is_found(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", train=(["t0.tar", "t1.tar"], COLOUR), test=(["e0.tar"], GRAY))
    assert stored_statistics([shard(folder / "t0.tar"), shard(folder / "t1.tar")], 3) == COLOUR
    assert stored_statistics([shard(folder / "t1.tar")], 3) == COLOUR
    assert stored_statistics([shard(folder / "e0.tar")], 1) == GRAY


@pytest.mark.parametrize("position", [0, 1, 2])
def test_each_of_several_splits_is_found_wherever_it_stands(tmp_path: Path, position: int) -> None:
    names, found = ["train", "val", "test"], [PixelStatistics((m,), (0.5,)) for m in (0.1, 0.2, 0.3)]
    folder = folder_of(tmp_path / "a", **{n: ([f"{n}.tar"], s) for n, s in zip(names, found, strict=True)})
    assert stored_statistics([shard(folder / f"{names[position]}.tar")], 1) == found[position]


def test_nothing_is_found_unless_all_shards_are_covered_by_one_result(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", train=(["0.tar"], COLOUR), test=(["1.tar"], GRAY), old=(["2.tar"], None))
    b = folder_of(tmp_path / "b", train=(["0.tar"], COLOUR))
    c = folder_of(tmp_path / "c", train=(["0.tar"], PixelStatistics((0.3,) * 3, (0.2,) * 3)))
    (tmp_path / "bare").mkdir()
    assert stored_statistics([shard(a / "0.tar"), shard(b / "0.tar")], 3) == COLOUR
    for shards in (
        [a / "0.tar", a / "1.tar"],  # of two splits
        [a / "0.tar", a / "9.tar"],  # not listed
        [a / "2.tar"],  # listed without statistics
        [a / "0.tar", c / "0.tar"],  # of different statistics
        [a / "0.tar", tmp_path / "bare" / "0.tar"],  # one folder without
        [tmp_path / "bare" / "0.tar"],
    ):
        assert stored_statistics([shard(path) for path in shards], 3) is None


def test_statistics_of_a_shard_that_was_replaced_are_not_used(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", train=(["0.tar", "1.tar"], COLOUR))
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"] = [10, 20]
    (folder / "_info.json").write_text(json.dumps(info))
    shards = [shard(folder / "1.tar")]
    assert stored_statistics(shards, 3, {"1.tar": 20}) == COLOUR
    assert stored_statistics(shards, 3, {"1.tar": 21}) is None


def test_gray_statistics_serve_gray_and_colour(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", gray=(["g.tar"], GRAY), colour=(["c.tar"], COLOUR))
    assert stored_statistics([shard(folder / "g.tar")], 3) == PixelStatistics((0.25,) * 3, (0.5,) * 3)
    assert stored_statistics([shard(folder / "g.tar")], 4) is None  # the fourth plane is full everywhere
    assert stored_statistics([shard(folder / "c.tar")], 1) is None
    assert stored_statistics([shard(folder / "c.tar")], 4) is None


def test_nothing_is_stored_beside_remote_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", train=(["0.tar"], COLOUR))
    assert stored_statistics([shard(folder / "0.tar"), Shard("s3://bucket/0.tar", 1, "")], 3) is None


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[]", "must hold a JSON mapping"), ("\xff", "as JSON")]
)
def test_a_damaged_info_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "_info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{tmp_path}/_info\.json .*{message}"):
        read_info(tmp_path)


def test_no_info_file_is_an_empty_one(tmp_path: Path) -> None:
    assert read_info(tmp_path) == {}
