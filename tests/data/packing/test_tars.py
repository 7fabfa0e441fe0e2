import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import png

from data.packing.packs import listed
from mae.data.packing.items import Extent
from mae.errors import UserError


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/in-{0..1}.tar"])
def test_shards_are_named_by_folder_glob_or_braces(
    write_tar: Callable[..., Path], tmp_path: Path, pattern: str
) -> None:
    for number in range(2):
        write_tar(f"source/in-{number}.tar", {f"{number}.png": png(number)})
    (tmp_path / "source" / "classes.txt").write_text("one\ntwo")
    found, items = listed(f"{tmp_path}/source{pattern}")
    assert list(items) == ["in-0.tar/0", "in-1.tar/1"]
    assert found.classes == ["one", "two"]


def test_shards_of_img2dataset_and_hugging_face_keep_captions_and_tables_stay_out(
    write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    files = {"000000000.jpg": png(0), "000000000.json": b"{}", "000000000.txt": b"a"}
    write_tar("source/00000.tar", files)
    (tmp_path / "source" / "00000.parquet").touch()
    (tmp_path / "source" / "00000_stats.json").touch()
    found, items = listed(tmp_path / "source")
    (item,) = items.values()
    assert {name: extent.read() for name, extent in item.side_files} == {"json": b"{}", "txt": b"a"}
    assert item.size == len(png(0)) + 3
    assert not found.left_out


def test_d01_a_source_shard_that_is_cut_is_refused(write_tar: Callable[..., Path]) -> None:
    tar = write_tar("in.tar", {"a.png": png(0)})
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"in\.tar is not a valid tar file"):
        listed(tar)


def test_s08_links_in_a_tar_are_no_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        (tmp_path / "a.png").write_bytes(png(0))
        tar.add(tmp_path / "a.png", "a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    _, items = listed(tmp_path / "in.tar")
    assert list(items) == ["in.tar/a"]


def test_d06_shards_without_images_are_refused(write_tar: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"in\.tar contains no image"):
        listed(write_tar("in.tar", {"a.txt": b"x"}))


def test_s03_keys_without_an_image_are_counted(write_tar: Callable[..., Path]) -> None:
    found, items = listed(write_tar("in.tar", {"a.png": png(0), "b.txt": b"x", "b.cls": b"1", ".c.png": b"x"}))
    assert list(items) == ["in.tar/a"]
    assert found.notices() == ["3 files are left out: 1 b.cls, 1 .c.png, 1 b.txt"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["a.png", "b.png", "a.png"], r"in\.tar: file 'a\.png' occurs twice; remove one", id="S06"),
        pytest.param(["a.png", "b.png", "a.PNG"], r"in\.tar: file 'a\.PNG' occurs twice; remove one", id="S06 case"),
        pytest.param(["a.png", "a.jpg"], "has 2 images", id="two images"),
        pytest.param(["a.gif", "a.jfif"], r"'a' has 2 images \(gif, jfif\); leave one", id="two converted images"),
    ],
)
def test_s06_a_source_shard_with_two_images_for_a_key_is_refused(
    write_tar: Callable[..., Path], names: list[str], message: str
) -> None:
    tar = write_tar("in.tar", [(name, png(0)) for name in names])
    with pytest.raises(UserError, match=message):
        listed(tar)


@pytest.mark.parametrize("key", ["{}", "cam.2024.{}"])
def test_s07_files_of_a_key_are_brought_together(write_tar: Callable[..., Path], key: str) -> None:
    names = [f"{key.format(number)}.{ending}" for ending in ("png", "cls") for number in range(3)]
    _, items = listed(write_tar("in.tar", [(name, name.encode()) for name in names]))
    assert list(items) == [f"in.tar/{key.format(number)}" for number in range(3)]
    for name, item in items.items():
        assert isinstance(item.image, Extent)
        files = {"png": item.image, **dict(item.side_files)}
        assert {ending: extent.read() for ending, extent in files.items()} == {
            ending: f"{name.removeprefix('in.tar/')}.{ending}".encode() for ending in ("png", "cls")
        }


def test_without_labels_no_label_file_is_packed(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    tar = write_tar("in.tar", {"a.png": png(0), "a.cls": b"cat", "a.txt": b"x"})
    (tmp_path / "classes.txt").write_text("cat\n")
    found, items = listed(tar, labels="none")
    assert [ending for ending, _ in items["in.tar/a"].side_files] == ["txt"]
    assert (found.classes, found.notices()) == ([], [])


def test_shards_without_images_are_passed_over_and_named(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    write_tar("in-0.tar", {})
    write_tar("in-1.tar", {"a.png": png(0)})
    found, items = listed(f"{tmp_path}/in-*.tar")
    assert list(items) == ["in-1.tar/a"]
    assert found.notices() == [f"1 of 2 shards contain no image: {tmp_path}/in-0.tar"]


def test_labels_without_class_names_are_told_of(write_tar: Callable[..., Path]) -> None:
    tar = write_tar("in.tar", {"a.png": png(0), "a.cls": b"0"})
    told = "no classes.txt is beside the shards; labels are taken as numbers: "
    assert listed(tar)[0].notices() == [f"{told}--classes FILE gives them names"]
    found, _ = listed(tar, ("cat", "dog"))
    assert found.notices() == [f"{told}class N is line N + 1 of the packed classes.txt"]
    assert found.classes == ["cat", "dog"]


def test_class_lists_of_two_folders_of_shards_must_agree(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tar(f"{name}/{name}.tar", {"a.png": png(0), "a.cls": b"0"})
        (tmp_path / name / "classes.txt").write_text(f"ant\n{name}\n")
    with pytest.raises(UserError, match=r"different classes: label 1 is 'two' in the first, 'one' in the second; pack"):
        listed(f"{tmp_path}/*/*.tar")


def test_images_that_only_packing_knows_are_found(write_tar: Callable[..., Path]) -> None:
    _, items = listed(write_tar("in.tar", {"a.gif": b"x", "a.cls": b"0", "b.jfif": b"x", "c.png": png(0)}))
    assert [(name, item.extension) for name, item in items.items()] == [
        ("in.tar/a", "gif"), ("in.tar/b", "jfif"), ("in.tar/c", "png"),
    ]  # fmt: skip
