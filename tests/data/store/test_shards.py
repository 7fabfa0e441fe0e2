import gzip
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data import servers
from data.servers import WebServer
from mae.data.store import unpacked
from mae.data.store.shards import Shard, expand
from mae.data.store.unpacked import default_cache_dir, plain_tar, unpacked_bytes
from mae.errors import UserError

web, s3, impatient = servers.web, servers.s3, servers.impatient


@pytest.fixture
def folder(make_shards: Callable[..., Path]) -> Path:
    """Three shards of one sample each: train-000000.tar ... train-000002.tar."""
    return make_shards([1, 1, 1])


def gzipped(folder: Path, name: str = "packed.tar.gz") -> Path:
    path = folder.parent / name
    path.write_bytes(gzip.compress((folder / "train-000000.tar").read_bytes()))
    return path


def shard_at(path: Path | str) -> Shard:
    (shard,) = expand([str(path)])
    return shard


@pytest.mark.parametrize("prefix", ["", "file://", "file://localhost"])
def test_a_path_names_itself_with_its_size_and_time(folder: Path, prefix: str) -> None:
    path = folder / "train-000001.tar"
    stat = path.stat()
    (found,) = expand([f"{prefix}{path}"])
    assert found == Shard(str(path), stat.st_size, str(stat.st_mtime_ns))
    assert (str(found), found.name, found.is_remote) == (str(path), "train-000001.tar", False)


@pytest.mark.parametrize(
    "pattern",
    ["", "/", "/*.tar", "/train-??????.tar", "/train-{000000..000002}.tar", "/train-00000{0,1,2}.tar", "/../*/*.tar"],
)
def test_folders_globs_and_braces_name_all_shards_in_order(folder: Path, pattern: str) -> None:
    found = expand([f"{folder}{pattern}"])
    assert [Path(shard.url).resolve() for shard in found] == [folder / f"train-00000{n}.tar" for n in range(3)]


def test_patterns_keep_the_order_given(folder: Path) -> None:
    names = [f"{folder}/train-00000{n}.tar" for n in (2, 0, 1)]
    assert [shard.url for shard in expand(names)] == names
    assert [shard.name for shard in expand([f"{folder}/train-{{000002..000001}}.tar", names[1]])] == [
        "train-000002.tar",
        "train-000001.tar",
        "train-000000.tar",
    ]


def test_a_folder_gives_tars_and_gzipped_tars_and_nothing_else(folder: Path) -> None:
    for name in ("a.tar.gz", "b.tgz", "classes.txt", "_info.json", "c.tar.part"):
        (folder / name).write_bytes(b"x")
    assert [shard.name for shard in expand([str(folder)])] == [
        "a.tar.gz",
        "b.tgz",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]


def test_a_name_with_magic_characters_may_exist_as_it_is(folder: Path) -> None:
    odd = folder / "odd[1].tar"
    odd.write_bytes(b"x")
    assert [shard.url for shard in expand([str(odd)])] == [str(odd)]


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
        ("empty", "folder .*empty contains no .tar"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_with_itself_d09(folder: Path, pattern: str, message: str) -> None:
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
    assert plain_tar(shard_at(folder / "train-000000.tar"), tmp_path / "cache") == folder / "train-000000.tar"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["packed.tar.gz", "packed.tgz", "packed.gz"])
def test_a_gzipped_shard_is_unpacked_into_the_cache_once(folder: Path, tmp_path: Path, name: str) -> None:
    source = gzipped(folder, name)
    unpacked = plain_tar(shard_at(source), tmp_path / "cache")
    assert unpacked.name == "packed.tar"
    assert unpacked.is_relative_to(tmp_path / "cache")
    assert unpacked.read_bytes() == (folder / "train-000000.tar").read_bytes()
    unpacked.write_bytes(b"kept")
    assert plain_tar(shard_at(source), tmp_path / "cache") == unpacked
    assert unpacked.read_bytes() == b"kept"


def test_a_changed_source_is_unpacked_anew(folder: Path, tmp_path: Path) -> None:
    source = gzipped(folder)
    first = plain_tar(shard_at(source), tmp_path / "cache")
    source.write_bytes(gzip.compress((folder / "train-000001.tar").read_bytes()))
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    second = plain_tar(shard_at(source), tmp_path / "cache")
    assert second != first
    assert second.read_bytes() == (folder / "train-000001.tar").read_bytes()


def test_gzipped_shards_of_one_name_do_not_share_a_copy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    copies = [plain_tar(shard_at(gzipped(folder, f"{name}/packed.tar.gz")), tmp_path / "cache") for name in ("a", "b")]
    assert len(set(copies)) == 2


def test_several_that_unpack_at_once_get_one_whole_copy(folder: Path, tmp_path: Path) -> None:
    source = gzipped(folder)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: plain_tar(shard_at(source), tmp_path / "cache"), range(4)))
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
            plain_tar(shard_at(source), tmp_path / "cache")
    assert {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()} == {"lock"}
    source.write_bytes(good)
    assert plain_tar(shard_at(source), tmp_path / "cache").read_bytes() == (folder / "train-000000.tar").read_bytes()


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be unpacked into .*file.*; unpack it yourself or set data\.cache_dir"):
        plain_tar(shard_at(gzipped(folder)), tmp_path / "file")


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


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch {made}",
        "pipe:curl https://user:hidden@host/a.tar",
        "|touch {made}",
        "-o{made}",
        "--exec=touch {made}",
        "filecache::s3://bucket/a.tar",
        "simplecache::https://user:hidden@host/a.tar",
        "ftp://user:hidden@host/a.tar",
        "sftp://host/a.tar",
        "github://org:repo@main/a.tar",
        "local:///a.tar",
        "memory://a.tar",
        "gcs://bucket/a.tar",
        "{a,pipe:touch {made}}",
    ],
)
def test_x02_commands_chains_and_other_schemes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = tmp_path / "made"
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://=pipe:touch {made} ")
    monkeypatch.setenv("WDS_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"begins with '.*'; allowed: a path, file://, s3://, .* commands are never run"
    ) as caught:
        expand([name.replace("{made}", str(made))])
    assert "hidden" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_url_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"'file://server/a\.tar', a file on another machine; write file:///"):
        expand(["file://server/a.tar"])


def test_a_file_url_may_hold_percent_signs_and_globs(folder: Path) -> None:
    (folder / "with space.tar").write_bytes(b"x")
    assert [shard.name for shard in expand([f"file://{folder}/with%20space.tar"])] == ["with space.tar"]
    assert len(expand([f"file://{folder}/train-00000?.tar"])) == 3


@pytest.fixture
def served(web: WebServer, folder: Path) -> WebServer:
    """The three shards under /set/ of a web server."""
    web.files = {f"/set/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    return web


@pytest.mark.parametrize("pattern", ["train-{000000..000002}.tar", "train-*.tar", "train-00000[012].tar", ""])
def test_shards_of_a_web_server_are_named_by_braces_and_where_it_lists_by_globs_and_folders(
    served: WebServer, folder: Path, pattern: str
) -> None:
    served.files["/set/classes.txt"] = b"x"
    served.lists = True
    found = expand([f"{served.url}/set/{pattern}"])
    assert [shard.url for shard in found] == [f"{served.url}/set/train-00000{n}.tar" for n in range(3)]
    assert [shard.size for shard in found] == [path.stat().st_size for path in sorted(folder.iterdir())]
    assert all(shard.is_remote and len(shard.version) == 34 for shard in found)


@pytest.mark.parametrize("pattern", ["train-*.tar", ""])
def test_a_server_without_listings_needs_braces(served: WebServer, pattern: str) -> None:
    with pytest.raises(UserError, match=r"/set/.* that its server lists; servers without listings need braces: train-"):
        expand([f"{served.url}/set/{pattern}?token=1"])
    served.always = "403"
    with pytest.raises(UserError, match=r"need braces"):
        expand([f"{served.url}/set/{pattern}"])


@pytest.mark.parametrize(
    "pattern",
    ["set", "set/", "set/*.tar", "s*/train-??????.tar", "set/train-{000000..000002}.tar", "set/train-00000{0,1,2}.tar"],
)
def test_shards_in_s3_are_named_by_folders_globs_and_braces(s3: Any, folder: Path, pattern: str) -> None:
    for path in folder.iterdir():
        s3.upload_file(str(path), "bucket", f"set/{path.name}")
    s3.put_object(Bucket="bucket", Key="set/classes.txt", Body=b"x")
    s3.put_object(Bucket="bucket", Key="set/deeper/x.tar", Body=b"x")
    found = expand([f"s3://bucket/{pattern}"])
    assert [shard.url for shard in found] == [f"s3://bucket/set/train-00000{n}.tar" for n in range(3)]
    assert [shard.size for shard in found] == [path.stat().st_size for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("pattern", ["none", "none/", "none/*.tar"])
def test_what_matches_nothing_in_s3_is_refused_with_itself(s3: Any, pattern: str) -> None:
    with pytest.raises(UserError, match=rf"s3://bucket/{pattern}".replace("*", r"\*")):
        expand([f"s3://bucket/{pattern}"])


def test_d08_missing_shards_of_all_kinds_are_named_together(served: WebServer, s3: Any, folder: Path) -> None:
    patterns = [
        f"{folder}/train-{{000002..000003}}.tar",
        f"{served.url}/set/train-{{000002..000003}}.tar?token=hidden",
        "s3://bucket/train-{000000..000005}.tar",
    ]
    with pytest.raises(UserError, match=r"^8 of 10 shards do not exist: .*and 3 more$") as caught:
        expand(patterns)
    assert f"{folder}/train-000003.tar, {served.url}/set/train-000003.tar, s3://" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_patterns_of_all_kinds_keep_the_order_given(served: WebServer, folder: Path) -> None:
    names = [f"{served.url}/set/train-000001.tar", f"{folder}/train-000002.tar", f"{served.url}/set/train-000000.tar"]
    assert [shard.url for shard in expand(names)] == names


def test_d10_a_remote_shard_listed_twice_is_refused(served: WebServer) -> None:
    with pytest.raises(UserError, match=r"shard http.*/set/train-000001\.tar is listed twice"):
        expand([f"{served.url}/set/train-000001.tar", f"{served.url}/set/train-{{000000..000001}}.tar"])


def test_a_url_that_fails_is_no_missing_shard(served: WebServer) -> None:
    served.always = "503"
    with pytest.raises(UserError, match=r"train-000000\.tar cannot be read, 3 attempts failed: HTTP 503"):
        expand([f"{served.url}/set/train-000000.tar"])


@pytest.mark.parametrize("name", ["packed.tar.gz", "packed.tgz", "plain.tar"])
def test_a_remote_shard_is_downloaded_and_unpacked_once(
    served: WebServer, folder: Path, tmp_path: Path, name: str
) -> None:
    data = (folder / "train-000000.tar").read_bytes()
    served.files[f"/{name}"] = data if name == "plain.tar" else gzip.compress(data)
    shard = shard_at(f"{served.url}/{name}")
    unpacked = plain_tar(shard, tmp_path / "cache")
    assert unpacked.name == f"{name.partition('.')[0]}.tar"
    assert unpacked.read_bytes() == data
    assert {path.name for path in unpacked.parent.iterdir()} == {"lock", unpacked.name}
    served.always = "503"
    assert plain_tar(shard, tmp_path / "cache") == unpacked


def test_a_damaged_remote_gzip_is_refused_and_leaves_nothing_behind(served: WebServer, tmp_path: Path) -> None:
    served.files["/packed.tar.gz"] = cut(gzip.compress(served.files["/set/train-000000.tar"]))
    with pytest.raises(UserError, match=r"shard http.*/packed\.tar\.gz is a damaged gzip file"):
        plain_tar(shard_at(f"{served.url}/packed.tar.gz"), tmp_path / "cache")
    assert {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()} == {"lock"}


def test_a_range_that_would_name_too_many_shards_is_refused_at_once(folder: Path) -> None:
    for pattern in ("x-{000000000..999999999}.tar", "x-{0..999999}{0..999999}.tar", "{" * 2000 + "}" * 2000):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"pattern '.*' cannot be expanded: (a range has more than 1,000,000|max)"):
            expand([pattern])
        assert time.monotonic() - began < 10
    with pytest.raises(UserError, match="names more than 1,000,000 shards; pack fewer and larger ones"):
        expand(["x-{0..999}{0..9}{0..999}.tar"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"C:\data\x.tar", r"pattern C:\\data\\x\.tar is a path of Windows"),
        ("d:/data/{0..3}.tar", "pattern d:/data/.* is a path of Windows"),
        (r"\\server\x.tar", "is a path of Windows"),
        ("a.tar,b.tar", r"1 of 1 shards do not exist: a\.tar,b\.tar; several shards are separated by blanks"),
        ("~nobody-of-this-name/x.tar", r"contains ~nobody-of-this-name/x\.tar: .*; write the whole path"),
        ("x" * 300 + ".tar", "cannot be found: File name too long: x.*; correct the path"),
    ],
)
def test_names_of_other_worlds_are_shown_as_given(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand([pattern])


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert [shard.url for shard in expand(["~/train-00000{0,2}.tar"])] == [
        f"{folder}/train-00000{n}.tar" for n in (0, 2)
    ]


def test_a_folder_of_images_is_told_how_to_be_packed(tmp_path: Path) -> None:
    images = tmp_path / "my images"
    (images / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"folder {images} contains no \.tar.*: mae pack '{images}' --out SHARDS"):
        expand([str(images)])
    with pytest.raises(UserError, match=rf"{images}/a is a folder: name .*, or pack its images: mae pack '{images}/a"):
        expand([f"{images}/*"])


def bomb(folder: Path, size: int) -> Path:
    """A small gzip file of so many zeros."""
    path = folder / "bomb.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(bytes(size))
    return path


def test_a_small_file_that_unpacks_to_very_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_ANY_RATIO_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"has [\d,]+ bytes but unpacks to more than 1,048,576 .*; if right, unpack"):
        plain_tar(shard_at(bomb(tmp_path, 4 << 20)), tmp_path / "cache")
    assert unpacked_bytes(tmp_path / "cache") == 0


def test_unpacked_shards_count_for_the_size_of_the_cache(folder: Path, tmp_path: Path) -> None:
    size = (folder / "train-000000.tar").stat().st_size
    for name in ("a", "b"):
        plain_tar(shard_at(gzipped(folder, f"{name}.tar.gz")), tmp_path / "cache", 2.0 * size)
    assert unpacked_bytes(tmp_path / "cache") == 2 * size
    with pytest.raises(UserError, match=rf"holds {2 * size:,} bytes, allowed are {2 * size:,} \(data\.cache_bytes\);"):
        plain_tar(shard_at(gzipped(folder, "c.tar.gz")), tmp_path / "cache", 2.0 * size)
    assert unpacked_bytes(tmp_path / "cache") == 2 * size


def test_a_disk_is_not_filled_by_unpacking(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_SHARE_OF_FREE_DISK", 0.0)
    with pytest.raises(UserError, match=r"has [\d,]+ bytes free, of which at most 0% .*set data\.cache_dir"):
        plain_tar(shard_at(gzipped(folder)), tmp_path / "cache")
