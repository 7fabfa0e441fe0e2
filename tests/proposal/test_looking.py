"""Looking at sources: folders are counted whole and drawn from, shards are grouped by the split in their names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae.data.store.shards import expand
from mae.errors import UserError
from mae.proposal.looking import look_into
from mae.proposal.patterns import by_split, patterns_of, split_of
from mae.proposal.sampling import IMAGES, look_at
from tests.conftest import png, write_shards

Say = Callable[[str], None]


def quiet(text: str) -> None:
    """Say nothing."""


def write_images(folder: Path, count: int, first: int = 0, mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        (folder / f"{number:04d}.png").write_bytes(png(number, (8, 12), mode))


def test_splits_and_classes_are_counted_and_the_first_split_is_decoded(tmp_path: Path) -> None:
    for split, count in (("val", 2), ("train", 5)):
        for number, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "photos" / split / name, count + number)
    (tmp_path / "photos" / "train" / "notes.txt").write_text("x")
    look = look_into(str(tmp_path / "photos"), "auto", None, quiet)
    train, val = look.splits
    assert (train.name, train.images, train.per_class) == ("train", 11, {0: 5, 1: 6})
    assert (val.name, val.images, val.folder) == ("val", 5, str(tmp_path / "photos" / "val"))
    assert look.class_names == ("cat", "dog")
    assert any("notes.txt" in notice for notice in look.notices)
    images = look_at(look.images)
    assert (images.sampled, set(images.sizes), images.planes) == (11, {(8, 12)}, {3: 11})


def test_of_many_images_some_are_drawn_by_a_fixed_seed_from_all_places(tmp_path: Path) -> None:
    write_images(tmp_path / "many", 1)
    (original,) = (tmp_path / "many").iterdir()
    for number in range(1, 2 * IMAGES):
        (tmp_path / "many" / f"{number:04d}.png").hardlink_to(original)
    drawn = [[name for name, _ in look_into(str(tmp_path / "many"), "auto", None, quiet).images] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == IMAGES
    late = sum(name >= f"{IMAGES:04d}" for name in drawn[0])
    assert 0.35 * IMAGES < late < 0.65 * IMAGES
    # Of large images only the first are looked at, so these come from all places, too.
    assert 0.2 * 48 < sum(name >= f"{IMAGES:04d}" for name in drawn[0][:48]) < 0.8 * 48


def test_gray_colour_alpha_wide_and_bad_images_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    write_images(folder, 2)
    (folder / "gray.png").write_bytes(png(3, (8, 8), "L"))
    (folder / "alpha.png").write_bytes(png(4, (8, 8), "RGBA"))
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "wide.png")
    np.save(folder / "array.npy", np.zeros((8, 8, 5), np.float32))
    Image.new("P", (9, 9)).save(folder / "old.gif")
    (folder / "cut.jpg").write_bytes(b"nothing")
    images = look_at(look_into(str(folder), "auto", None, quiet).images)
    assert images.planes == {3: 4, 1: 2, 5: 1}
    assert (images.transparent, images.arrays, images.wide.images) == (1, 1, 2)
    assert images.statistics is None
    (bad,) = images.bad
    assert bad.startswith("cut.jpg (")


def test_shards_are_grouped_by_split_and_named_by_one_glob(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [4, 6])
    shutil.copy(shards / "train-000000.tar", shards / "a-val-000000.tar")
    look = look_into(str(shards), "auto", None, quiet)
    train, val = look.splits
    assert (train.images, train.shards, train.labelled) == (10, (f"{shards}/train-*.tar",), True)
    assert (val.images, val.shards) == (4, (f"{shards}/a-val-000000.tar",))
    assert look.measured == 10
    assert look_at(look.images).sampled == 10
    only = look_into(f"{shards}/train-*.tar", "auto", None, quiet)
    assert [split.shards for split in only.splits] == [(f"{shards}/train-*.tar",)]


def test_shards_in_folders_of_splits_need_no_packing(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_shards(tmp_path / "set" / "train", [4, 6])
    write_shards(tmp_path / "set" / "val", [4])
    train, val = look_into(str(tmp_path / "set"), "auto", None, quiet).splits
    assert (train.name, train.images, val.name, val.images) == ("train", 10, "val", 4)
    assert train.shards
    assert not train.folder


def test_a_glob_names_exactly_the_shards_of_a_split(tmp_path: Path) -> None:
    for name in ("x-train-00.tar", "x-train-01.tar", "x-train-extra.tar", "y-00.tar", "x-test-0.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    groups = by_split(expand([str(tmp_path)]))
    assert {name: len(shards) for name, shards in groups.items()} == {"train": 4, "test": 1}
    assert len(patterns_of(groups["train"])) == 4
    assert patterns_of(groups["train"][:1]) == (str(tmp_path / "x-train-00.tar"),)
    assert [split_of(name) for name in ("training-0.tar", "TEST_0.tar", "0.tar")] == ["train", "test", "train"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "contains no image"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x")), "contains no image"),
        (lambda folder: None, "does not exist; give a folder of images"),
        (lambda folder: folder.with_suffix(".png").write_bytes(png(0)), "does not exist"),
        (lambda folder: (write_images(folder / "cat", 1), (folder / "a.png").write_bytes(png(1))), "--labels none"),
    ],
)
def test_what_is_no_set_of_images_is_refused_in_one_line(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "set")
    with pytest.raises(UserError, match=message) as error:
        look_into(str(tmp_path / "set"), "auto", None, quiet)
    assert "\n" not in str(error.value)


def test_a_single_image_file_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(UserError, match="is one image"):
        look_into(str(tmp_path / "a.png"), "auto", None, quiet)
