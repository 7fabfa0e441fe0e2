import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import png
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.data.packing.sources import Extent, Item, Source, find_images, from_line, known_classes, to_line
from mae.data.scan import NO_LABEL
from mae.errors import UserError

NOWHERE = Path("/nowhere")
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """ant/ 0 3 6 9, bee/ 1 4 7 10 and cat/ 2 5 8 11, with hidden and foreign files about."""
    root = tmp_path / "tree"
    for number in range(12):
        path = root / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    for hidden in (".DS_Store", "ant/._00.png", ".git/00.png", ".hidden.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(b"x")
    (root / "README.txt").write_text("text")
    (root / "cat" / "Thumbs.db").write_text("text")
    return root


def listed(source: Path | str, known: tuple[str, ...] = ()) -> tuple[Source, dict[str, Item]]:
    found = find_images(str(source), NOWHERE, known)
    return found, {item.name: item for item in found.items}


def test_a_tree_is_listed_in_order_with_labels_and_sizes(tree: Path) -> None:
    found, items = listed(tree)
    assert list(items) == [f"{name}/{n:02d}.png" for c, name in enumerate(CLASSES) for n in range(c, 12, 3)]
    assert [item.label for item in items.values()] == [0] * 4 + [1] * 4 + [2] * 4
    assert found.classes == list(CLASSES)
    assert [item.size for item in items.values()] == [(tree / name).stat().st_size for name in items]
    item = items["bee/04.png"]
    assert isinstance(item.image, Extent)
    assert item.image.read() == png(4)


def test_s08_hidden_files_are_passed_over_and_other_files_are_counted(tree: Path) -> None:
    (tree / "bee" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tree / "bee" / "pipe.png")
    found, items = listed(tree)
    assert len(items) == 12
    assert found.ignored == 4
    assert found.first_ignored == ["README.txt", "bee/gone.png", "bee/pipe.png", "cat/Thumbs.db"]


def test_only_the_first_of_many_foreign_files_are_remembered(tree: Path) -> None:
    for number in range(20):
        (tree / "ant" / f"{number}.txt").touch()
    found, _ = listed(tree)
    assert (found.ignored, len(found.first_ignored)) == (22, 5)


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


def test_a_class_without_images_is_none(tree: Path) -> None:
    (tree / "bat").mkdir()
    (tree / "bat" / "notes.txt").touch()
    found, _ = listed(tree)
    assert found.classes == list(CLASSES)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    found, items = listed(tmp_path)
    assert [item.label for item in items.values()] == [NO_LABEL] * 3
    assert found.classes == []


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
    assert found.ignored == 0


def test_s03_keys_without_an_image_are_counted(write_tar: Callable[..., Path]) -> None:
    found, items = listed(write_tar("in.tar", {"a.png": png(0), "b.txt": b"x", "b.cls": b"1", ".c.png": b"x"}))
    assert list(items) == ["in.tar/a"]
    assert (found.ignored, found.first_ignored) == (3, ["b.txt", "b.cls"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["a.png", "b.png", "a.png"], "'a' occurs twice", id="S06"),
        pytest.param(["a.png", "b.png", "a.txt"], "not side by side", id="S07"),
        pytest.param(["a.png", "a.jpg"], "has 2 images", id="two images"),
    ],
)
def test_s06_s07_a_source_shard_that_is_in_disorder_is_refused(
    write_tar: Callable[..., Path], names: list[str], message: str
) -> None:
    tar = write_tar("in.tar", [(name, png(0)) for name in names])
    with pytest.raises(UserError, match=message):
        listed(tar)


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


def test_a_class_that_is_not_known_is_refused(tree: Path) -> None:
    with pytest.raises(UserError, match=r"classes that the packed classes\.txt does not list: bee, cat; pack splits"):
        listed(tree, ("ant", "dog"))


def test_labels_are_places_in_a_known_class_list(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\nbee\nant")
    assert known_classes(tmp_path) == ("cat", "bee", "ant")
    found, items = listed(tree, ("cat", "bee", "ant"))
    assert {name[:3]: item.label for name, item in items.items()} == {"cat": 0, "bee": 1, "ant": 2}
    assert found.classes == ["cat", "bee", "ant"]


def test_images_beside_folders_of_images_are_refused(tree: Path) -> None:
    (tree / "stray.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"contains 1 images \(the first is stray\.png\) beside 12 in class folders"):
        listed(tree)


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match=r"contains no image \(\.jpg, "):
        listed(tmp_path)
    with pytest.raises(UserError, match="do not exist"):
        listed(tmp_path / "none")


def test_d06_shards_without_images_are_refused(write_tar: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"in\.tar contains no image"):
        listed(write_tar("in.tar", {"a.txt": b"x"}))


def test_a_link_to_itself_is_named(tree: Path) -> None:
    (tree / "bee" / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match=r"bee/loop\.png cannot be read: Too many levels of symbolic links; fix or"):
        listed(tree)


def test_a_source_has_the_same_name_from_everywhere(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    assert listed("tree")[0].name == listed("./tree/")[0].name == listed(tree)[0].name == str(tree.resolve())


NAMES = st.text(min_size=1) | st.binary(min_size=1).map(os.fsdecode)
EXTENTS = st.builds(Extent, NAMES, st.integers(0, 2**40), st.integers(0, 2**32), st.booleans())


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Item,
        name=NAMES,
        extension=st.text(),
        image=st.binary() | EXTENTS,
        label=st.integers(-1, 10**18),
        side_files=st.lists(st.tuples(st.text(), EXTENTS)).map(tuple),
    )
)
def test_an_item_survives_being_written_down(item: Item) -> None:
    line = to_line(item, "/root")
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert from_line(line, "/root") == item


def test_a_file_of_a_tree_is_written_short(tree: Path) -> None:
    found, items = listed(tree)
    item = items["ant/00.png"]
    line = to_line(item, found.name)
    assert len(line) < 40
    assert from_line(line, found.name) == item
