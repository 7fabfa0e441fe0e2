"""A table of labels gives each image its class; what fits no image, or two, is refused."""

from pathlib import Path

import pytest
from conftest import png

from data.packing.packs import NOWHERE
from mae.data.packing.class_list import NO_CLASSES, ClassList
from mae.data.packing.items import Source
from mae.data.packing.label_table import read_label_table
from mae.data.packing.sources import find_splits
from mae.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, of which one is in a folder of its own, and a file of text."""
    for number, name in enumerate(("a.png", "b.v2.png", "c.png", "old/d.png", "train/e.png", "notes.txt")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "photos"


def listed(
    photos: Path, text: str, known: ClassList = NO_CLASSES, name: str = "labels.csv"
) -> tuple[Source, dict[str, int]]:
    """The source after its listing, and the label of each image."""
    table = photos.parent / name
    table.write_text(text, encoding="utf-8")
    (source,) = find_splits(str(photos), None, NOWHERE, known, table=read_label_table(table)).values()
    return source, {item.name: item.label for item in source.items}


def test_images_have_the_classes_of_their_lines_and_others_are_left_out(photos: Path) -> None:
    source, labels = listed(photos, 'image,class,who\n./a.png,wild rose,x\nb.v2,"oak, red"\nold/d.png,wild rose\n')
    assert labels == {"a.png": 1, "b.v2.png": 0, "old/d.png": 1}
    assert source.classes == ["oak, red", "wild rose"]
    assert source.notices()[1:] == ["3 files are left out: 2 without a line in labels.csv, 1 notes.txt"]


def test_folders_called_like_splits_are_folders(photos: Path) -> None:
    source, labels = listed(photos, "image,class\ntrain/e,rose\n")
    assert labels == {"train/e.png": 0}
    assert "splits (train) in " in source.remarks[0]
    assert "are taken as plain folders: all images that labels.csv names are packed together" in source.remarks[0]


def test_a_mask_is_not_the_image_that_it_is_called_after(photos: Path) -> None:
    (photos / "a.png.png").write_bytes(png(8))
    assert listed(photos, "image,class\na.png,rose\n")[1] == {"a.png": 0}
    (photos / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 1 images in .* are not in .*: a\.png; give the paths of image files"):
        listed(photos, "image,class\na.png,rose\n")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("\ufeffimage,class\r\na,é\r\n\r\nc,o\r\n", "labels.csv"),
        ("image\tclass\na\té\nc\to\n", "labels.TSV"),
        ('image, class\na, "é"\nc,o\n', "labels.csv"),
    ],
)
def test_what_programs_for_tables_write_is_read(photos: Path, text: str, name: str) -> None:
    source, labels = listed(photos, text, name=name)
    assert (source.classes, labels) == (["o", "é"], {"a.png": 1, "c.png": 0})


def test_labels_are_places_in_a_known_class_list(photos: Path) -> None:
    known = ClassList(("rose", "oak"), "classes.txt")
    assert listed(photos, "image,class\na,oak\n", known)[1] == {"a.png": 1}
    with pytest.raises(UserError, match=r"labels\.csv has classes that classes\.txt does not list: elm"):
        listed(photos, "image,class\na,elm\n", known)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,class\n", "names no image; it needs a line of headings"),
        ("", "names no image"),
        ("image,class\na,oak\nz,oak\ny.png,elm\n", "2 of 3 images in .* are not in .*photos: z, y.png; give"),
        ("image,class\na,oak\nb.v2\n", "line 3 of label_file .* has no class; it needs"),
        ("image,class\na,\n", "line 2 of .* has no class"),
        ("image,class\n,oak\n", "line 2 of .* has no path"),
        ("image;class\na;oak\n", "line 1 of .* has no class"),
        ("image,class\na,oak\n./a,elm\n", "line 3 of .* names a again; an image has one class"),
        ("a.png,oak\nc.png,elm\n", "line 1 of .* names the image a.png; it must be headings"),
        ("a,oak\nc,elm\n", "line 1 of .* names the image a.png; it must be headings"),
        ('image,class\na,"oak\n', "is no table in UTF-8 .*; it needs"),
        ('image,class\na,"red\noak"\n', r"class 'red\\noak' in .* has control characters"),
    ],
)  # fmt: skip
def test_a_table_that_would_lose_or_shift_labels_is_refused(photos: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed(photos, text)


def test_a_line_for_two_images_is_refused(photos: Path) -> None:
    (photos / "a.jpg").write_bytes(png(9))
    with pytest.raises(UserError, match=r"a in .* names two images, a\.jpg and a\.png; give their extensions"):
        listed(photos, "image,class\na,oak\n")
    assert listed(photos, "image,class\na.jpg,oak\na.png,elm\n")[1] == {"a.jpg": 1, "a.png": 0}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"image,class\na,caf\xe9\n")
    for path, reason in (
        (tmp_path / "none.csv", "No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "latin.csv", "no table in UTF-8"),
    ):
        with pytest.raises(UserError, match=f"label_file {path} .*{reason}.*; it needs a line of headings"):
            read_label_table(path)


def test_a_folder_without_images_and_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,class\na,oak\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no image"):
        listed(tmp_path / "empty", "image,class\na,oak\n")
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match=r"label_file is for folders of images, but .* is made of shards"):
        find_splits(str(tmp_path / "x.tar"), None, NOWHERE, table=read_label_table(tmp_path / "labels.csv"))
