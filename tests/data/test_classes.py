"""Class names beside shards: read, compared, and reported where there are none."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data import servers
from data.servers import WebServer
from mae.data.classes import class_names, read_class_list
from mae.data.store.shards import Shard, expand
from mae.errors import UserError

web, impatient = servers.web, servers.impatient


def shards_of(*folders: Path) -> list[Shard]:
    return expand([str(folder) for folder in folders])


@pytest.fixture
def two_folders(make_shards: Callable[..., Path]) -> tuple[Path, Path]:
    return make_shards([3], name="first"), make_shards([3, 2], name="second")


def test_names_are_lines_by_label_and_any_bytes_of_a_file_name(two_folders: tuple[Path, Path]) -> None:
    first, _ = two_folders
    (first / "classes.txt").write_bytes("bär\n".encode() + b"caf\xe9\nzebra finch\n")
    assert class_names(shards_of(first), print) == ("bär", "caf\udce9", "zebra finch")


def test_without_a_list_there_are_no_names(two_folders: tuple[Path, Path]) -> None:
    said: list[str] = []
    assert class_names(shards_of(*two_folders), said.append) is None
    assert not said


def test_folders_of_one_set_have_one_list_and_a_folder_without_one_is_reported(two_folders: tuple[Path, Path]) -> None:
    first, second = two_folders
    (first / "classes.txt").write_text("cat\ndog\n")
    said: list[str] = []
    assert class_names(shards_of(second, first), said.append) == ("cat", "dog")
    assert said == [
        f"{second}/classes.txt does not exist: the labels of its shards are taken by number, as in {first}/classes.txt"
    ]
    shutil.copy(first / "classes.txt", second)
    assert class_names(shards_of(second, first), said.append) == ("cat", "dog")
    assert len(said) == 1


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("dog\nemu\n", "of 2 and 2 classes: label 0 is 'cat' in the first and 'dog' in the second"),
        ("cat\ndog\nemu\n", "of 2 and 3 classes: label 2 is no class in the first and 'emu' in the second"),
        ("cat\n", "of 2 and 1 classes: label 1 is 'dog' in the first and no class in the second"),
    ],
)
def test_two_lists_that_differ_are_refused_at_the_first_difference(
    two_folders: tuple[Path, Path], other: str, difference: str
) -> None:
    first, second = two_folders
    (first / "classes.txt").write_text("cat\ndog\n")
    (second / "classes.txt").write_text(other)
    with pytest.raises(UserError) as caught:
        class_names(shards_of(first, second), print)
    assert str(caught.value).startswith(f"{first}/classes.txt and {second}/classes.txt have different class lists")
    assert difference in str(caught.value)
    assert "pack both with one list: mae pack ... --classes FILE, or into the same --out" in str(caught.value)


def test_a_list_over_http_is_read_and_a_missing_one_is_none(web: WebServer, make_shards: Callable[..., Path]) -> None:
    folder = make_shards([3])
    web.files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
    shards = expand([f"{web.url}/train-000000.tar"])
    assert class_names(shards, print) is None
    web.files["/classes.txt"] = b"cat\ndog\n"
    assert class_names(shards, print) == ("cat", "dog")


def test_a_signed_url_is_asked_for_no_other_object_with_its_signature(
    web: WebServer, make_shards: Callable[..., Path]
) -> None:
    web.files = {f"/{path.name}": path.read_bytes() for path in make_shards([3]).iterdir()} | {"/classes.txt": b"cat\n"}
    assert class_names(expand([f"{web.url}/train-000000.tar?signature=a/b"]), print) == ("cat",)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "large", "twice"])
def test_a_list_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "classes.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate((16 << 20) + 1)
    else:
        path.write_text("cat\ndog\ncat\n")
    with pytest.raises(
        UserError, match=rf"class list {path} (is not a reg|cannot be|has 16,7)|lines 1 and 3 of {path} are"
    ):
        read_class_list(path)
