"""One shard is read once: every sample is written down, or the shard is refused by name."""

import io
import os
import resource
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import png
from PIL import Image
from webdataset import ShardWriter

from data.test_tar import header, padded
from mae.data.images.decode import decode
from mae.data.scan import NO_LABEL, ShardScan, scan, split_name
from mae.errors import BadImageError, UserError

END = bytes(1024)
LONG = "folder/" * 20 + "ü" * 60
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def sample(number: int, label: int | bytes | None = None, key: str | None = None) -> dict[str, bytes]:
    key = f"{number:06d}" if key is None else key
    text = label if isinstance(label, bytes) else str(label).encode()
    return {f"{key}.png": png(number)} | ({} if label is None else {f"{key}.cls": text})


def checked(block: bytes) -> bytes:
    """A header with the checksum that belongs to it."""
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def keys_of(path: Path, found: ShardScan) -> list[str]:
    """Names of the images, read by Python's tarfile at the places that the scan found."""
    with tarfile.open(path) as tar:
        name_at = {member.offset_data: member.name for member in tar}
    return [name_at[offset] for offset in found.records["offset"].tolist()]


def by_tarfile(path: Path, extension: str = ".png") -> list[tuple[int, int, int, int]]:
    """(offset, size, crc32, label) of each image by an independent reading."""
    with tarfile.open(path) as tar:
        files = {member.name: member for member in tar if member.isreg()}
        found = []
        for name, member in files.items():
            if name.endswith(extension):
                content, label = tar.extractfile(member), files.get(name.removesuffix(extension) + ".cls")
                assert content is not None
                text = tar.extractfile(label) if label else None
                crc32 = zlib.crc32(content.read())
                found.append((member.offset_data, member.size, crc32, int(text.read()) if text else NO_LABEL))
    return found


def numbered(count: int) -> dict[str, bytes]:
    return {name: data for n in range(count) for name, data in sample(n, n % 3).items()}


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_records_equal_an_independent_reading(write_tar: Callable[..., Path], tar_format: int) -> None:
    files = numbered(20) | sample(20) | sample(21, 5, "a/b c/d")
    path = write_tar("x.tar", files, tar_format)
    assert scan(path).records.tolist() == by_tarfile(path)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_records_of_long_and_foreign_names_equal_an_independent_reading(
    write_tar: Callable[..., Path], tar_format: int
) -> None:
    keys = [LONG, LONG + "2", "ж", "z" * 96, "z" * 97, "/".join(["long" * 10] * 5)]
    files = [item for n, key in enumerate(keys) for item in sample(n, n, key).items()]
    path = write_tar("x.tar", files, tar_format, mtime=1.5 if tar_format == tarfile.PAX_FORMAT else 1)
    found = scan(path)
    assert found.records.tolist() == by_tarfile(path)
    assert keys_of(path, found) == [f"{key}.png" for key in keys]
    assert found.records["label"].tolist() == list(range(6))


def test_shards_of_webdatasets_writer_are_read_whole(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%06d.tar"), maxcount=7, verbose=0, encoder=False) as writer:
        for n in range(7):
            writer.write({"__key__": f"a/{n:04d}", "png": png(n), "cls": b"2", "json": b"{}"})
    (path,) = tmp_path.glob("*.tar")
    found = scan(path)
    assert found.records.tolist() == by_tarfile(path)
    assert (len(found.records), found.extensions) == (7, {"png": 7, "cls": 7, "json": 7})


def test_base_256_sizes_are_read(tmp_path: Path) -> None:
    """As GNU tar writes sizes from 8 GiB on; any size may be written so."""
    block = bytearray(header("a.png", 0))
    block[124:136] = b"\x80" + len(png(0)).to_bytes(11, "big")
    path = tmp_path / "x.tar"
    path.write_bytes(checked(bytes(block)) + padded(png(0)) + END)
    assert scan(path).records.tolist() == by_tarfile(path) == [(512, len(png(0)), zlib.crc32(png(0)), NO_LABEL)]


def test_old_v7_headers_are_read(tmp_path: Path) -> None:
    """Without the word ustar, and with a NUL for the type of a plain file."""
    blocks = [header(name, len(data))[:156] + bytes(356) + padded(data) for name, data in sample(0, 3, "a").items()]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(checked(block[:512]) + block[512:] for block in blocks) + END)
    assert scan(path).records.tolist() == by_tarfile(path) == [(512, len(png(0)), zlib.crc32(png(0)), 3)]


def test_an_open_descriptor_is_read_as_its_path(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", numbered(3))
    with path.open("rb") as file:
        found = scan(file.fileno(), "s3://bucket/x.tar")
    assert found.records.tolist() == scan(path).records.tolist()
    with path.open("rb") as file, pytest.raises(UserError, match=r"^shard s3://bucket/x\.tar is not a valid tar"):
        os.truncate(path, 0)
        path.write_bytes(b"x" * 512)
        scan(file.fileno(), "s3://bucket/x.tar")


def scan_or_refusal(descriptor: int) -> ShardScan | str:
    try:
        return scan(descriptor, "x")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_no_value_of_any_header_byte_hides_a_sample_d03(write_tar: Callable[..., Path], tar_format: int) -> None:
    """Every byte of every header set to many values, single-bit flips among them: refused, or read as before."""
    key = "a" if tar_format == tarfile.USTAR_FORMAT else LONG
    path = write_tar("x.tar", sample(0, 1, key) | sample(1, None, "b"), tar_format, mtime=1)
    whole, data = scan(path), path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [(member.offset, member.offset_data) for member in tar]
    # A long name takes three blocks: a header, the name itself, which no checksum covers, and the proper header.
    blocks = [block for first, content in headers for block in {first, content - 512}]
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for position in (position for block in blocks for position in range(block, block + 512)):
            old = data[position]
            values = {old ^ 1 << bit for bit in range(8)} | {0, 0x20, 0x30, 0x37, 0x80, 0xFF, old - 1 & 255}
            # All of them for the fields that decide, some for names and padding.
            some = values if position % 512 in range(100, 265) else {old ^ 1 << position % 8, 0xFF}
            for value in some - {old}:
                os.pwrite(file.fileno(), bytes([value]), position)
                found = scan_or_refusal(file.fileno())
                if isinstance(found, str):
                    assert found.startswith("shard x is not a valid tar file: ")
                    refused += 1
                else:
                    assert found.records.tolist() == whole.records.tolist()
                    assert (found.digest, found.without_image) == (whole.digest, whole.without_image)
            os.pwrite(file.fileno(), bytes([old]), position)
    assert scan(path).digest == whole.digest
    assert refused > 1500 * len(blocks)  # all but a few of the two blanks behind each checksum


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        pytest.param(lambda d: d[: 5 * 512 + 40], r"has \d+ bytes, but only 40", id="d01-cut-inside-a-member"),
        pytest.param(lambda d: d[: 4 * 512], "without the end-of-archive mark", id="d02-cut-between-members"),
        pytest.param(lambda d: b"b" + d[1:], r"bad header at byte 0", id="d03-header-byte"),
        pytest.param(lambda d: d[:1024] + bytes(512) + d[1536:], r"single block of zeros at byte 1024", id="d04-512"),
        pytest.param(lambda d: d[:1024] + bytes(1024) + d[2048:], r"data follows .* byte 1024", id="d04-1024"),
        pytest.param(lambda d: b"", "the file is empty", id="d05-empty"),
        pytest.param(lambda d: b"<html>404</html>" * 99, "bad header at byte 0", id="d07-html"),
        pytest.param(lambda d: b"\x1f\x8b" + d, r"gzip data, but its name does not end in \.gz", id="d07-gzip"),
        pytest.param(lambda d: np.random.default_rng(0).bytes(5000), "bad header at byte 0", id="d07-noise"),
        pytest.param(lambda d: header("a.png", 2**60) + d, rf"has {2**60} bytes, but only", id="x06-huge-size"),
        pytest.param(lambda d: header("a.png", -512) + d, "has -512 bytes, but only", id="x06-negative-size"),
        pytest.param(lambda d: header("x", 2**50, b"x") + d, r"has \d+ bytes, but only|claims", id="x06-huge-pax"),
    ],
)  # fmt: skip
def test_a_faulty_tar_is_refused_by_name_and_byte(
    write_tar: Callable[..., Path], damage: Callable[[bytes], bytes], why: str
) -> None:
    path = write_tar("x.tar", numbered(5))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"shard {path}\b.*({why})") as caught:
        scan(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(10_000 * (header("x", 14, b"x") + padded(b"14 path=b.png\n")), id="many-headers-for-one-member"),
        pytest.param(8 * (header("x", 1 << 20, b"x") + b"4 a\n" * (1 << 18)), id="large-headers"),
        pytest.param(20_000 * (header("x", 6, b"L") + padded(b"b.png\0")), id="many-long-names"),
    ],
)
def test_floods_of_extended_headers_take_little_time_and_memory_x06(tmp_path: Path, records: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(records + header("a.png", len(png(0))) + padded(png(0)) + END)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert scan(path).records["size"].tolist() == [len(png(0))]
    assert time.perf_counter() - began < 20
    # The file itself is mapped, and counts as far as it was read.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < len(records) + (64 << 20)


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.png", "a", "png"),
        ("a.b/img.seg.PNG", "a.b/img", "seg.png"),
        ("../x.jpg", "../x", "jpg"),
        ("dir/.hidden", "dir/", "hidden"),
        ("noext", "noext", ""),
        ("/abs/a.png", "/abs/a", "png"),
    ],
)
def test_names_split_as_webdataset_splits_them(name: str, key: str, extension: str) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == (key, extension)
    base, rest = base_plus_ext(name)
    # webdataset gives (None, None) for what is no sample
    assert base is None or (base, rest.lower()) == (key, extension)


def test_names_with_several_dots_are_one_sample_each_s04(write_tar: Callable[..., Path]) -> None:
    files = {}
    for n in range(9, 12):
        files |= {f"img.v2.{n:06d}.jpg": png(n), f"img.v2.{n:06d}.cls": str(n).encode()}
    path = write_tar("x.tar", files)
    found = scan(path)
    assert keys_of(path, found) == ["img.v2.000009.jpg", "img.v2.000010.jpg", "img.v2.000011.jpg"]
    assert found.records["label"].tolist() == [9, 10, 11]
    assert (found.extensions, found.without_image) == ({"jpg": 3, "cls": 3}, ())


def test_a_side_image_never_becomes_a_sample_where_its_image_is_missing_s03_s04(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", sample(0, 0, "a") | {"a.seg.png": png(9), "b.seg.png": png(1), "b.cls": b"1"})
    found = scan(path)
    assert keys_of(path, found) == ["a.png"]
    assert found.without_image == ("b",)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npy", "JPG", "Png"])
def test_each_image_extension_is_found_in_either_case_s05(write_tar: Callable[..., Path], extension: str) -> None:
    found = scan(write_tar("x.tar", {f"a.{extension}": png(0), "a.CLS": b"3"}))
    assert found.records["label"].tolist() == [3]
    assert found.extensions == {extension.lower(): 1, "cls": 1}


def test_extensions_may_be_mixed_in_one_shard_s05(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", {"a.JPG": png(0), "b.jpeg": png(1), "c.png": png(2), "d.WebP": png(3)})
    assert keys_of(path, scan(path)) == ["a.JPG", "b.jpeg", "c.png", "d.WebP"]


def test_hidden_files_and_files_without_extension_are_counted_as_ignored_s08(write_tar: Callable[..., Path]) -> None:
    files = {
        ".hidden.png": png(9),
        "README": b"text",
        "dir/._000000.png": png(8),
        **sample(0, 1, "dir/000000"),
        "dir/.DS_Store": b"x",
        "dir/000001.png": png(1),
        "dir/LICENSE": b"text",
        "dir/000001.cls": b"2",
    }
    path = write_tar("x.tar", files)
    found = scan(path)
    assert keys_of(path, found) == ["dir/000000.png", "dir/000001.png"]
    assert found.records["label"].tolist() == [1, 2]
    assert found.extensions == {"png": 2, "cls": 2}
    assert found.left_out == {"hidden files": (3, ".hidden.png"), "files without an extension": (2, "README")}


def write_links(path: Path, links: list[tuple[bytes, str, str]]) -> Path:
    """A tar of `folder/a.png`, and links to it and to others: (type, name, target)."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("folder/a.png")
        info.size = len(png(0))
        tar.addfile(info, io.BytesIO(png(0)))
        for kind, name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def test_what_is_no_file_is_counted_by_kind_and_named_s08(tmp_path: Path) -> None:
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
    links = [(kind, f"{kind.decode()}{n}.png", "elsewhere/a.png") for kind in kinds for n in range(2)]
    path = write_links(tmp_path / "x.tar", [*links, (tarfile.GNUTYPE_SPARSE, "s.png", "")])
    found = scan(path)
    assert keys_of(path, found) == ["folder/a.png"]
    assert found.left_out == {
        "folders": (2, "50.png"),
        "symbolic links": (2, "20.png"),
        "hard links to a file that is not before them in the tar": (2, "10.png"),
        "fifos": (2, "60.png"),
        "devices": (4, "30.png"),
        "sparse files": (1, "s.png"),
    }


@pytest.mark.parametrize("target", ["folder/a.png", LONG + ".png"], ids=["short", "long"])
def test_a_hard_link_to_a_file_of_the_tar_is_a_sample_of_its_bytes_s08(
    write_tar: Callable[..., Path], target: str
) -> None:
    """As tar writes a file whose inode it has written already; `LONG` takes a record of its own."""
    path = write_tar("x.tar", {target: png(0), "z.cls": b"3"}, tarfile.GNU_FORMAT)
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        for name, to in (("b.png", target), ("c.png", "b.png"), ("c.cls", "z.cls")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, to
            tar.addfile(info)
    found = scan(path)
    (first, *links), crc32 = found.records.tolist(), zlib.crc32(png(0))
    assert [record[1:] for record in (first, *links)] == [(len(png(0)), crc32, label) for label in (-1, -1, 3)]
    assert {record[0] for record in links} == {first[0]}
    assert found.left_out == {"files without an image": (1, "z.cls")}


def test_links_made_by_tar_itself_are_told_or_followed_s08(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    subprocess.run(["tar", "cf", "x.tar", "a.png", "b.png", "c.png"], cwd=tmp_path, check=True)
    found = scan(tmp_path / "x.tar")
    assert len(found.records) == 2
    assert found.left_out == {"symbolic links": (1, "c.png")}


def test_a_file_with_holes_is_told_s08(tmp_path: Path) -> None:
    """GNU tar leaves the zeros out of the bytes that it stores."""
    with (tmp_path / "a.png").open("wb") as file:
        file.write(png(0))
        file.truncate(1 << 20)
    (tmp_path / "b.png").write_bytes(png(1))
    for tar_format in ("gnu", "posix"):
        command = ["tar", "cSf", "x.tar", f"--format={tar_format}", "a.png", "b.png"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found = scan(tmp_path / "x.tar")
        assert keys_of(tmp_path / "x.tar", found) == ["b.png"]
        assert found.left_out == {"sparse files": (1, "a.png")}


@pytest.mark.parametrize(
    "files",
    [{}, {"README": b"x", ".hidden.png": b"y"}, {"a.cls": b"1", "a.txt": b"2"}],
    ids=["d06-empty", "d06-no-sample", "d06-labels-only"],
)
def test_a_shard_without_images_has_no_samples_d06(write_tar: Callable[..., Path], files: dict[str, bytes]) -> None:
    found = scan(write_tar("x.tar", files))
    assert len(found.records) == 0
    assert sum(counted.number for counted in found.left_out.values()) == len(files)


def roles(count: int, *extensions: str) -> dict[str, bytes]:
    return {f"{n:03d}.{extension}": png(n) for n in range(count) for extension in extensions}


@pytest.mark.parametrize("count", [1, 2, 12])
def test_two_images_of_a_key_are_refused_and_the_setting_named_s04(write_tar: Callable[..., Path], count: int) -> None:
    path = write_tar("x.tar", roles(count, "image.jpg", "mask.png"))
    message = (
        rf"{count} samples have several images, the first is '000' with \.image\.jpg, \.mask\.png; .*data\.image_ext"
    )
    with pytest.raises(UserError, match=message):
        scan(path)
    found = scan(path, "", "image.jpg")
    assert len(found.records) == count
    assert found.extensions == {"image.jpg": count, "mask.png": count}
    assert found.left_out == {}


def test_numbered_images_of_one_name_are_samples_each_s04(write_tar: Callable[..., Path]) -> None:
    names = [f"{name}.{n}.jpg" for name in ("cat", "dog") for n in range(10)]
    path = write_tar("x.tar", {name: png(n) for n, name in enumerate(names)})
    assert keys_of(path, scan(path)) == names


def test_images_of_an_extension_that_is_not_the_one_named_are_left_out(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", roles(2, "image.jpg", "mask.png") | {"z.png": png(9), "z.cls": b"1"})
    found = scan(path, "", "image.jpg")
    assert keys_of(path, found) == ["000.image.jpg", "001.image.jpg"]
    assert found.without_image == ("z",)
    assert found.left_out == {
        "image files with another dot in their names": (1, "z.png"),
        "files without an image": (1, "z.cls"),
    }


def test_dotted_names_beside_plain_ones_are_counted_by_files_s04(write_tar: Callable[..., Path]) -> None:
    files = {f"{n}.jpg": png(n) for n in range(8)} | {f"cam.2024.{n:04d}.jpg": png(n) for n in range(100)}
    found = scan(write_tar("x.tar", files))
    assert (len(found.records), found.without_image) == (8, ("cam",))
    assert found.left_out == {"image files with another dot in their names": (100, "cam.2024.0000.jpg")}


@pytest.mark.parametrize("key", ["/etc/x", "../../x", "a/../../x", "\\x", "x\ny"])
def test_a_name_is_never_used_as_a_path_s09(
    write_tar: Callable[..., Path], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "here").mkdir(parents=True)
    path = write_tar("x.tar", sample(0, 1, key))
    monkeypatch.chdir(tmp_path / "in" / "here")
    before = sorted(tmp_path.rglob("*"))
    assert len(scan(path).records) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_side_files_belong_to_their_image(write_tar: Callable[..., Path]) -> None:
    files = {
        "a.cls": b"1",
        "a.json": b"{}",
        "a.png": png(0),
        "a.seg.png": png(5),
        "a.txt": b"",
        "b.SEG.png": png(6),
        "b.jpg": png(1),
    }
    path = write_tar("x.tar", files)
    found = scan(path)
    assert keys_of(path, found) == ["a.png", "b.jpg"]
    assert found.records["label"].tolist() == [1, NO_LABEL]
    assert found.extensions == {"cls": 1, "json": 1, "png": 1, "seg.png": 2, "txt": 1, "jpg": 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({"a.png": b"1", "a.jpg": b"2"}, r"sample 'a' has 2 images \(png, jpg\)", id="two-images"),
        pytest.param({"a.png": b"1", "b.png": b"2", "a.cls": b"3"}, "'a' occurs twice, or its files", id="s07-apart"),
        pytest.param([("a.png", b"1"), ("b.png", b"2"), ("a.png", b"3")], "'a' occurs twice", id="s06-again-later"),
        pytest.param([("a.png", b"1"), ("a.png", b"2")], "key 'a' occurs twice", id="s06-twice-in-succession"),
        pytest.param([("a.png", b"1"), ("a.PNG", b"2")], "key 'a' occurs twice", id="s06-in-two-cases"),
        pytest.param([("a.png", b"1"), ("a.cls", b"2"), ("a.cls", b"3")], "'a' occurs twice", id="s06-two-labels"),
        pytest.param({"a.1.png": b"1", "a.2.png": b"2", "a.1.cls": b"4"}, "'a.1' occurs", id="s04-s07"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_samples_is_refused_by_name(
    write_tar: Callable[..., Path], files: dict[str, bytes], message: str
) -> None:
    path = write_tar("bad.tar", files)
    with pytest.raises(UserError, match=rf"shard {path}\b.*{message}"):
        scan(path)


def test_samples_without_an_image_are_listed_s03(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", sample(0, 0) | {"a.cls": b"1", "a.txt": b"2"} | sample(1, 1) | {"b.json": b"{}"})
    found = scan(path)
    assert found.without_image == ("a", "b")
    assert keys_of(path, found) == ["000000.png", "000001.png"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>", r"it begins with b'<html>', unlike any allowed image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "it begins with"),
        (b"\0" * 100, "it begins with"),
        (b"RIFF1234WAVE", "it begins with"),
    ],
    ids=["s01-empty", "html", "s13-eps", "zeros", "wave"],
)
def test_an_image_that_begins_as_none_is_listed_as_bad(
    write_tar: Callable[..., Path], content: bytes, reason: str
) -> None:
    found = scan(write_tar("x.tar", sample(0) | {"a.jpg": content}))
    (bad,) = found.bad
    assert bad.startswith(f"a.jpg ({reason[:14]}")
    assert len(found.records) == 2
    with pytest.raises(BadImageError):
        decode(content, 1)


FORMS = {
    "jpeg": ("JPEG", {}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "big-tiff": ("TIFF", {"big_tiff": True}),
    "webp": ("WEBP", {}),
    "lossless-webp": ("WEBP", {"lossless": True}),
}


@pytest.mark.parametrize(("name", "options"), FORMS.values(), ids=FORMS)
def test_no_image_that_can_be_decoded_is_listed_as_bad(
    write_tar: Callable[..., Path], name: str, options: dict[str, bool]
) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 7).save(buffer, format=name, **options)
    assert decode(buffer.getvalue(), 1).shape == (1, 8, 8)
    assert scan(write_tar("x.tar", {"a.png": buffer.getvalue()})).bad == ()


def test_an_array_is_not_listed_as_bad(write_tar: Callable[..., Path]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4, 2), dtype=np.uint8))
    assert scan(write_tar("x.tar", {"a.npy": buffer.getvalue()})).bad == ()


@pytest.mark.parametrize(
    ("text", "label"), [(b"0", 0), (b"7\n", 7), (b" 12\r\n", 12), (b"007", 7), (b"9" * 18, 10**18 - 1)]
)
def test_labels_are_integers_with_white_space_around(write_tar: Callable[..., Path], text: bytes, label: int) -> None:
    assert scan(write_tar("x.tar", sample(0, text))).records["label"].tolist() == [label]


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "1.0", "cat", "1 2", "+1", "0x1", "²", "9" * 19, "9" * 20, "1" * 40, "3" + " " * 40 + "x"],
    ids=lambda text: repr(text[:8]),
)
def test_a_label_that_is_no_class_number_is_told_and_stops_nothing_s14(
    write_tar: Callable[..., Path], text: str
) -> None:
    found = scan(write_tar("x.tar", sample(0, text.encode()) | sample(1, 7)))
    assert found.records["label"].tolist() == [NO_LABEL, 7]
    (counted,) = found.left_out.items()
    assert counted[0] == "labels that are no integer >= 0 of at most 18 digits"
    assert counted[1].number == 1
    assert counted[1].first.startswith("000000.cls is b'")


def test_every_change_of_the_samples_changes_the_digest(write_tar: Callable[..., Path]) -> None:
    a, b, c = sample(0, 0), sample(1, 1), sample(2, 0)
    changed = bytearray(png(2))
    changed[-1] ^= 1
    sets = {
        "original": a | b | c,
        "order": b | a | c,
        "label": a | b | sample(2, 1),
        "no label": a | b | sample(2),
        "fewer": a | b,
        "key": a | b | sample(2, 0, key="000003"),
        "foreign key": a | b | sample(2, 0, key="\udce4"),
        "other foreign key": a | b | sample(2, 0, key="\udcf6"),
        "extension": a | b | {"000002.jpg": png(2), "000002.cls": b"0"},
        "size": a | b | {"000002.png": png(2) + b"x", "000002.cls": b"0"},
        "a bit": a | b | {"000002.png": bytes(changed), "000002.cls": b"0"},
    }
    found = {
        name: scan(write_tar(f"{n}.tar", files, tarfile.GNU_FORMAT)).digest
        for n, (name, files) in enumerate(sets.items())
    }
    assert len(set(found.values())) == len(sets)
    assert scan(write_tar("again.tar", a | b | c, tarfile.GNU_FORMAT)).digest == found["original"]
