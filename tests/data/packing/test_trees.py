import os
import shutil
from pathlib import Path

import pytest
from conftest import png

from data.packing.packs import listed
from mae.data.packing.class_list import known_classes
from mae.data.packing.items import Extent
from mae.data.packing.trees import Labels
from mae.data.scan import NO_LABEL
from mae.errors import UserError

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def tree(tree: Path) -> Path:
    """The shared tree, with hidden and foreign files about."""
    for hidden in (".DS_Store", "ant/._00.png", ".git/00.png", ".hidden.png"):
        (tree / hidden).parent.mkdir(exist_ok=True)
        (tree / hidden).write_bytes(b"x")
    (tree / "README.txt").write_text("text")
    (tree / "cat" / "Thumbs.db").write_text("text")
    return tree


def test_a_tree_is_listed_in_order_with_labels_and_sizes(tree: Path) -> None:
    found, items = listed(tree)
    assert list(items) == [f"{name}/{n:02d}.png" for c, name in enumerate(CLASSES) for n in range(c, 12, 3)]
    assert [item.label for item in items.values()] == [0] * 4 + [1] * 4 + [2] * 4
    assert found.classes == list(CLASSES)
    assert [item.size for item in items.values()] == [(tree / name).stat().st_size for name in items]
    item = items["bee/04.png"]
    assert isinstance(item.image, Extent)
    assert item.image.read() == png(4, mode="RGB")


@pytest.mark.parametrize("name", ["x.JPG", "x.jpeg", "x.PNG", "x.webp", "x.bmp", "x.tif", "x.TIFF", "x.v2.000.png"])
def test_s04_s05_images_are_known_by_the_last_part_of_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(png(0))
    _, items = listed(tmp_path)
    assert items[name].extension == name.rpartition(".")[2].lower()


def test_images_in_deeper_folders_belong_to_the_topmost_class(tree: Path) -> None:
    (tree / "bee" / "old" / "x").mkdir(parents=True)
    shutil.move(tree / "bee" / "01.png", tree / "bee" / "old" / "x" / "01.png")
    _, items = listed(tree)
    assert items["bee/old/x/01.png"].label == 1


def test_a_class_may_be_a_link_to_a_folder(tree: Path, tmp_path: Path) -> None:
    shutil.move(tree / "bee", tmp_path / "bee")
    (tree / "bee").symlink_to(tmp_path / "bee")
    found, items = listed(tree)
    assert found.classes == list(CLASSES)
    assert len(items) == 12


def test_a_link_that_leads_back_is_refused(tree: Path) -> None:
    (tree / "bee" / "all").symlink_to(tree)
    with pytest.raises(UserError, match="bee/all is a link to a folder that contains it; remove the link"):
        listed(tree)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    found, items = listed(tmp_path)
    assert [item.label for item in items.values()] == [NO_LABEL] * 3
    assert found.classes == []


def test_labels_are_places_in_a_known_class_list(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\nbee\nant")
    assert known_classes(tmp_path) == ("cat", "bee", "ant")
    found, items = listed(tree, ("cat", "bee", "ant"))
    assert {name[:3]: item.label for name, item in items.items()} == {"cat": 0, "bee": 1, "ant": 2}
    assert found.classes == ["cat", "bee", "ant"]


def test_a_link_to_itself_is_named(tree: Path) -> None:
    (tree / "bee" / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match=r"bee/loop\.png cannot be read: Too many levels of symbolic links; fix or"):
        listed(tree)


def test_s08_hidden_files_are_passed_over_and_other_files_are_counted(tree: Path) -> None:
    (tree / "bee" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tree / "bee" / "pipe.png")
    found, items = listed(tree)
    assert len(items) == 12
    assert found.notices() == [
        "4 files are left out: 2 broken links or special files, 1 Thumbs.db, 1 README.txt",
    ]


def test_a_class_without_images_keeps_its_label(tree: Path) -> None:
    """Else the labels of this split would be shifted against those of a split in which it has images."""
    (tree / "bat").mkdir()
    (tree / "bat" / "notes.txt").touch()
    found, items = listed(tree)
    assert found.classes == ["ant", "bat", "bee", "cat"]
    assert {name[:3]: item.label for name, item in items.items()} == {"ant": 0, "bee": 2, "cat": 3}


def test_images_deeper_than_their_class_are_told_of(tree: Path) -> None:
    (tree / "bee" / "old").mkdir()
    shutil.move(tree / "bee" / "01.png", tree / "bee" / "old" / "01.png")
    found, _ = listed(tree)
    assert found.remarks == [
        "1 of 12 images are deeper than CLASS/IMAGE, the first is bee/old/01.png: the topmost folder is their class; "
        "--labels none packs images without labels"
    ]


def test_a_tree_without_labels_may_be_of_any_depth(tree: Path) -> None:
    (tree / "bee" / "2024").mkdir()
    for path in (tree / "bee" / "2024" / "new.png", tree / "stray.png"):
        path.write_bytes(png(0))
    found, items = listed(tree, ("dog",), labels="none")
    assert len(items) == 14
    assert {item.label for item in items.values()} == {NO_LABEL}
    assert (found.classes, found.remarks) == ([], [])


@pytest.mark.parametrize("labels", ["auto", "folders"])
def test_images_beside_folders_of_images_are_refused(tree: Path, labels: Labels) -> None:
    (tree / "stray.png").write_bytes(png(0))
    with pytest.raises(
        UserError, match=r"1 images \(the first is stray\.png\) beside 12 in class folders; .*: --labels none$"
    ):
        listed(tree, labels=labels)


def test_a_flat_folder_has_no_labels_to_take_from_folders(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"1 images \(the first is 0\.png\) and no class folder; .*--labels none$"):
        listed(tmp_path, labels="folders")


def test_a_class_that_is_not_known_is_refused(tree: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"class folders that the packed classes\.txt does not list: bee, cat \(it lists ant, dog\)",
    ):
        listed(tree, ("ant", "dog"))


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x7fb", "a\u2028b", os.fsdecode(b"caf\xe9")])
def test_a_class_folder_that_breaks_the_class_list_is_refused(tree: Path, name: str) -> None:
    (tree / name).mkdir()
    with pytest.raises(UserError) as caught:
        listed(tree)
    assert f"class folder {name!r} in " in str(caught.value)
    assert str(caught.value).endswith("rename it")
    assert str(caught.value).isprintable()
    assert len(listed(tree, labels="none")[1]) == 12


def test_an_image_that_no_shard_can_hold_is_named(tree: Path) -> None:
    with (tree / "bee" / "vast.png").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(UserError, match=r"tree/bee/vast\.png is larger than 4 GiB; make it smaller or remove it"):
        listed(tree)


def test_jpegs_by_other_names_are_images(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.JPE"):
        (tmp_path / name).write_bytes(png(0))
    assert [item.extension for item in listed(tmp_path)[1].values()] == ["jfif", "jpe"]


def test_folders_may_not_be_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "/".join(["a"] * 256)).mkdir(parents=True)
    with pytest.raises(UserError, match="folders nested more than 256 deep"):
        listed(tmp_path, labels="none")
