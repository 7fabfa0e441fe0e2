import gzip
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mae.data.shards import default_cache_dir, expand, plain_tar
from mae.errors import UserError


@pytest.fixture
def folder(make_shards: Callable[..., Path]) -> Path:
    """Three shards of one sample each: train-000000.tar ... train-000002.tar."""
    return make_shards([1, 1, 1])


def gzipped(folder: Path, name: str = "packed.tar.gz") -> Path:
    path = folder.parent / name
    path.write_bytes(gzip.compress((folder / "train-000000.tar").read_bytes()))
    return path


def test_a_path_names_itself(folder: Path) -> None:
    assert expand([str(folder / "train-000001.tar")]) == [folder / "train-000001.tar"]


@pytest.mark.parametrize(
    "pattern",
    ["", "/", "/*.tar", "/train-??????.tar", "/train-{000000..000002}.tar", "/train-00000{0,1,2}.tar", "/../*/*.tar"],
)
def test_folders_globs_and_braces_name_all_shards_in_order(folder: Path, pattern: str) -> None:
    found = expand([f"{folder}{pattern}"])
    assert [path.resolve() for path in found] == [folder / f"train-00000{n}.tar" for n in range(3)]


def test_patterns_keep_the_order_given(folder: Path) -> None:
    names = [f"{folder}/train-00000{n}.tar" for n in (2, 0, 1)]
    assert [str(path) for path in expand(names)] == names
    assert [path.name for path in expand([f"{folder}/train-{{000002..000001}}.tar", names[1]])] == [
        "train-000002.tar",
        "train-000001.tar",
        "train-000000.tar",
    ]


def test_a_folder_gives_tars_and_gzipped_tars_and_nothing_else(folder: Path) -> None:
    for name in ("a.tar.gz", "b.tgz", "classes.txt", "_info.json", "c.tar.part"):
        (folder / name).write_bytes(b"x")
    assert [path.name for path in expand([str(folder)])] == [
        "a.tar.gz",
        "b.tgz",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]


def test_a_name_with_magic_characters_may_exist_as_it_is(folder: Path) -> None:
    odd = folder / "odd[1].tar"
    odd.write_bytes(b"x")
    assert expand([str(odd)]) == [odd]


def test_missing_shards_are_counted_and_named_together(folder: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 5 shards do not exist: .*train-000003\.tar, .*train-000004\.tar$"):
        expand([f"{folder}/train-{{000000..000004}}.tar"])
    with pytest.raises(UserError, match=r"97 of 100 shards do not exist: .* and 92 more$"):
        expand([f"{folder}/train-{{000000..000099}}.tar"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.tar", r"pattern '.*none-\*\.tar' matches no file"),
        ("train-{000000..000002.tar", r"pattern '.*' cannot be expanded: Unbalanced"),
        ("empty", "folder .*empty holds no .tar"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_with_itself(folder: Path, pattern: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        expand([str(folder / pattern)])


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.shards is empty"):
        expand([])


def test_a_shard_listed_twice_is_refused_also_through_a_symlink(folder: Path) -> None:
    (folder / "link.tar").symlink_to(folder / "train-000001.tar")
    both = r"shard .*train-000001\.tar is listed twice \(also as .*link\.tar\)"
    with pytest.raises(UserError, match=both):
        expand([str(folder)])
    with pytest.raises(UserError, match="listed twice"):
        expand([f"{folder}/train-000000.tar", f"{folder}/../{folder.name}/train-000000.tar"])


def test_a_plain_tar_is_read_where_it_lies(folder: Path, tmp_path: Path) -> None:
    assert plain_tar(folder / "train-000000.tar", tmp_path / "cache") == folder / "train-000000.tar"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["packed.tar.gz", "packed.tgz", "packed.gz"])
def test_a_gzipped_shard_is_unpacked_into_the_cache_once(folder: Path, tmp_path: Path, name: str) -> None:
    source = gzipped(folder, name)
    unpacked = plain_tar(source, tmp_path / "cache")
    assert unpacked.name == "packed.tar"
    assert unpacked.is_relative_to(tmp_path / "cache")
    assert unpacked.read_bytes() == (folder / "train-000000.tar").read_bytes()
    unpacked.write_bytes(b"kept")
    assert plain_tar(source, tmp_path / "cache") == unpacked
    assert unpacked.read_bytes() == b"kept"


def test_a_changed_source_is_unpacked_anew(folder: Path, tmp_path: Path) -> None:
    source = gzipped(folder)
    first = plain_tar(source, tmp_path / "cache")
    source.write_bytes(gzip.compress((folder / "train-000001.tar").read_bytes()))
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    second = plain_tar(source, tmp_path / "cache")
    assert second != first
    assert second.read_bytes() == (folder / "train-000001.tar").read_bytes()


def test_gzipped_shards_of_one_name_do_not_share_a_copy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    copies = [plain_tar(gzipped(folder, f"{name}/packed.tar.gz"), tmp_path / "cache") for name in ("a", "b")]
    assert len(set(copies)) == 2


def test_several_that_unpack_at_once_get_one_whole_copy(folder: Path, tmp_path: Path) -> None:
    source = gzipped(folder)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: plain_tar(source, tmp_path / "cache"), range(4)))
    assert len(set(copies)) == 1
    assert copies[0].read_bytes() == (folder / "train-000000.tar").read_bytes()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_the_checksum(data: bytes) -> bytes:
    return data[:-8]


def with_another_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes(4) + data[-4:]


def with_changed_content(data: bytes) -> bytes:
    return data[:30] + bytes(byte ^ 0xFF for byte in data[30:60]) + data[60:]


def not_gzip_at_all(data: bytes) -> bytes:
    return b"<html>404</html>" + data


@pytest.mark.parametrize(
    "damage", [cut, without_the_checksum, with_another_checksum, with_changed_content, not_gzip_at_all]
)
def test_a_damaged_gzip_is_refused_and_leaves_nothing_behind(folder: Path, tmp_path: Path, damage) -> None:
    source = gzipped(folder)
    good = source.read_bytes()
    source.write_bytes(damage(good))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"shard {re.escape(str(source))} is a damaged gzip file"):
            plain_tar(source, tmp_path / "cache")
    assert {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()} == {"lock"}
    source.write_bytes(good)
    assert plain_tar(source, tmp_path / "cache").read_bytes() == (folder / "train-000000.tar").read_bytes()


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be unpacked into .*file.*; unpack it yourself or set data\.cache_dir"):
        plain_tar(gzipped(folder), tmp_path / "file")


def test_the_cache_follows_the_xdg_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mae"
    for unset in ("", None):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "mae"
