"""Every shard is read whole or refused: never fewer members without an error."""

import io
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae.data.tar import members
from mae.errors import UserError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
END = bytes(1024)
LONG = "folder/" * 20 + "ü" * 60 + ".png"


def noise(number: int, size: int) -> bytes:
    return np.random.default_rng(number).bytes(size)


FILES = {f"{name}.png": noise(n, 700) for n, name in enumerate("abcd")}


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + padded(data)


@pytest.fixture
def tar_of(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the given bytes into a file called x.tar."""

    def write(*parts: bytes) -> Path:
        path = tmp_path / "x.tar"
        path.write_bytes(b"".join(parts))
        return path

    return write


def by_gnu_tar(path: Path, folder: Path, *flags: str) -> list[tuple[str, int]]:
    """Pack a folder by GNU tar; return names and sizes of the members."""
    subprocess.run(["tar", "-C", str(folder), *flags, "-cf", str(path), "."], check=True)
    return [(each.name, each.size) for each in members(path)]


def test_a_sparse_file_of_many_regions_is_passed_over_whole(tmp_path: Path) -> None:
    """GNU tar writes the map of more than four regions into blocks that the size does not count."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "holes.bin").open("wb") as file:
        for region in range(30):
            file.seek(region << 16)
            file.write(b"data")
        file.truncate(40 << 16)
    for name in ("a.png", "z.png"):
        (folder / name).write_bytes(noise(0, 700))
    for form in ("gnu", "oldgnu"):
        found = by_gnu_tar(tmp_path / "x.tar", folder, "--sparse", f"--format={form}")
        assert sorted(found) == [("./a.png", 700), ("./z.png", 700)]


def test_times_in_an_incremental_tar_are_no_part_of_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(noise(0, 700))
    os.utime(folder / "a.png", (1_000_000_000, 1_100_000_000))
    found = by_gnu_tar(tmp_path / "x.tar", folder, "--format=gnu", f"--listed-incremental={tmp_path}/list")
    assert found == [("./a.png", 700)]


def refused(path: Path, why: str) -> None:
    name = re.escape(str(path))
    with pytest.raises(UserError, match=rf"shard {name} is not a valid tar file: {why}.*; copy or pack it again"):
        members(path)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_equal_those_of_tarfile(write_tar: Callable[..., Path], tar_format: int) -> None:
    files = FILES | {"empty.txt": b"", "one.txt": b"1", "block.bin": noise(9, 512), "a/b/c.d.e": b"x" * 513}
    path = write_tar("x.tar", files, tar_format)
    assert [tuple(m) for m in members(path)] == by_tarfile(path)
    assert [path.read_bytes()[m.offset : m.offset + m.size] for m in members(path)] == list(files.values())


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_equal_those_of_tarfile(write_tar: Callable[..., Path], tar_format: int) -> None:
    path = write_tar("x.tar", {"a.png": b"1", LONG: b"2", "ж.png": b"3", "z" * 99: b"4", "z" * 100: b"5"}, tar_format)
    assert [tuple(m) for m in members(path)] == by_tarfile(path)
    assert [m.name for m in members(path)][1] == LONG


def test_names_split_into_a_ustar_prefix_are_put_together(write_tar: Callable[..., Path]) -> None:
    name = "/".join(["folder" * 5] * 5) + "/image.png"
    assert 100 < len(name) < 255
    assert [m.name for m in members(write_tar("x.tar", {name: b"1"}))] == [name]


def test_names_that_are_no_utf8_stay_distinct(tar_of: Callable[..., Path]) -> None:
    raw = [tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT, "latin-1") for name in ("ä.png", "ö.png")]
    path = tar_of(*raw, END)
    assert [m.name for m in members(path)] == ["\udce4.png", "\udcf6.png"] == [m[0] for m in by_tarfile(path)]


def test_pax_times_and_global_headers_equal_those_of_tarfile(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all of them"}) as tar:
        for number, (name, data) in enumerate(FILES.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = len(data), 1.5 + number, 2**40
            info.pax_headers = {"SCHILY.xattr.user.key": "a\nb=c"}
            tar.addfile(info, io.BytesIO(data))
    assert [tuple(m) for m in members(path)] == by_tarfile(path)
    assert [m.name for m in members(path)] == list(FILES)


def test_links_folders_and_devices_are_no_members_s08(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{LONG}-{kind.decode()}.png")
            info.type, info.linkname = kind, LONG
            tar.addfile(info)
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert [tuple(m) for m in members(path)] == by_tarfile(path)
    assert len(members(path)) == 5


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_the_size_that_a_link_or_folder_states_hides_no_member(tar_of: Callable[..., Path], kind: bytes) -> None:
    """No data follows such a header whatever its size says; skipping 1,024 bytes would skip a member."""
    path = tar_of(header("link", 1024, kind), member("a.png", b"1"), member("b.png", b"2"), END)
    assert [m.name for m in members(path)] == ["a.png", "b.png"]
    assert [tuple(m) for m in members(path)] == by_tarfile(path)


def test_members_of_an_unknown_type_are_skipped_with_their_data(tar_of: Callable[..., Path]) -> None:
    path = tar_of(member("odd", b"x" * 600, b"Z"), member("a.png", b"1"), END)
    assert [m.name for m in members(path)] == ["a.png"]


def test_an_archive_without_members_is_intact(tar_of: Callable[..., Path]) -> None:
    assert members(tar_of(END)) == []
    assert members(tar_of(bytes(tarfile.RECORDSIZE))) == []
    refused(tar_of(bytes(tarfile.RECORDSIZE + 512)), "it holds 10752 zeros and nothing else")


def test_a_size_in_a_pax_record_holds_for_the_member_after_it(tar_of: Callable[..., Path]) -> None:
    record = b"10 size=5\n"
    path = tar_of(
        member("x", record, tarfile.XHDTYPE),
        member("L", b"long.png\0", tarfile.GNUTYPE_LONGNAME),
        header("short.png", 0),
        padded(b"12345"),
        member("b.png", b"1"),
        END,
    )
    assert [(m.name, m.size) for m in members(path)] == [("long.png", 5), ("b.png", 1)]


def test_a_cut_anywhere_before_the_end_mark_is_refused_d01_d02(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_tar("whole.tar", FILES)
    data = whole.read_bytes()
    end = max(m.offset for m in members(whole)) + 1024  # each member of 700 bytes takes two blocks
    boundaries = [*(m.offset - 512 for m in members(whole)[1:]), end]
    path = tmp_path / "cut.tar"
    for length in sorted({*range(1, end + 1024, 61), *boundaries, *(b + 512 for b in boundaries), end + 1023}):
        path.write_bytes(data[:length])
        refused(path, "(it ends at byte|member .* has \\d+ bytes, but only|a single block of zeros|bad header)")
    path.write_bytes(data[: end + 1024])
    assert members(path) == members(whole)


def test_a_cut_inside_a_member_names_what_is_needed_and_present_d01(
    write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    whole = write_tar("whole.tar", FILES)
    third = members(whole)[2]
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[: third.offset + 300])
    refused(path, rf"member 'c\.png' at byte {third.offset} has 700 bytes, but only 300 are present")


def test_a_cut_between_members_names_the_missing_end_mark_d02(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_tar("whole.tar", FILES)
    boundary = members(whole)[2].offset - 512
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:boundary])
    refused(path, f"it ends at byte {boundary} without the end-of-archive mark")


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_a_flipped_byte_in_any_header_never_hides_a_member_d03(
    write_tar: Callable[..., Path], tar_format: int, flip: int
) -> None:
    """Bytes that no checksum covers, such as those of a PAX record, may change a name but nothing else."""
    ustar = tar_format == tarfile.USTAR_FORMAT
    files = {"a.png": noise(1, 700), "b.png" if ustar else LONG: noise(2, 700), "c.png": noise(3, 700)}
    path = write_tar("x.tar", files, tar_format, mtime=1 if ustar else 1.5)
    listing, data = members(path), path.read_bytes()
    begin, end = listing[0].offset + 1024, listing[1].offset
    assert end - begin == (512 if ustar else 1536)
    refusals: list[str] = []
    with path.open("r+b", buffering=0) as file:
        for position in range(begin, end):
            os.pwrite(file.fileno(), bytes([data[position] ^ flip]), position)
            try:
                found = members(path)
            except UserError as error:
                refusals.append(str(error))
            else:
                assert [(m.offset, m.size) for m in found] == [(m.offset, m.size) for m in listing]
            os.pwrite(file.fileno(), data[position : position + 1], position)
    assert members(path) == listing
    assert all(f"shard {path} is not a valid tar file" in refusal for refusal in refusals)
    assert len(refusals) > 500 * (1 if ustar else 2)  # all but a few bytes of each header


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_zeroed_blocks_never_hide_a_member_d04(write_tar: Callable[..., Path], tmp_path: Path, blocks: int) -> None:
    whole = write_tar("whole.tar", FILES)
    listing, path = members(whole), tmp_path / "zeroed.tar"
    headers = {m.offset - 512 for m in listing}
    for offset in range(0, listing[-1].offset - 512 * (blocks - 1), 512):
        data = bytearray(whole.read_bytes())
        data[offset : offset + 512 * blocks] = bytes(512 * blocks)
        path.write_bytes(data)
        if headers & set(range(offset, offset + 512 * blocks, 512)):
            refused(path, "(a single block of zeros|data follows the end-of-archive mark) at byte")
        else:
            assert members(path) == listing


def test_data_behind_the_end_mark_is_refused_d04(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", FILES)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(5000))
    assert len(members(path)) == 4
    with path.open("ab") as file:
        file.write(b"x")
    end = members_end(FILES)
    assert end < size
    refused(path, f"data follows the end-of-archive mark at byte {end}")


def members_end(files: dict[str, bytes]) -> int:
    return sum(512 + len(padded(data)) for data in files.values())


def test_two_archives_joined_by_cat_are_refused(tar_of: Callable[..., Path]) -> None:
    one = member("a.png", b"1") + END
    refused(tar_of(one, one), "data follows the end-of-archive mark")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>not found</html>" * 40, "bad header at byte 0"),
        (b"short", "it ends at byte 5 without"),
        (b"\x1f\x8b\x08\x00" + noise(1, 5000), r"it is gzip data, but its name does not end in \.gz"),
        (noise(2, 5000), "bad header at byte 0"),
        (bytes(512), "a single block of zeros at byte 0"),
        (b"PK\x03\x04" + noise(3, 2000), "bad header at byte 0"),
    ],
    ids=["empty", "html", "short", "gzip", "noise", "zeros", "zip"],
)
def test_what_is_no_tar_is_refused_d05_d07(tar_of: Callable[..., Path], content: bytes, why: str) -> None:
    refused(tar_of(content), why)


@pytest.mark.parametrize("size", [2**33, 2**60, 2**80])
def test_a_size_beyond_the_file_is_refused_x06(tar_of: Callable[..., Path], size: int) -> None:
    first = member("a.png", b"1")
    refused(tar_of(first, header("b.png", size), END), rf"member 'b\.png' at byte 1536 has {size} bytes, but only")


def test_a_negative_size_is_refused_x06(tar_of: Callable[..., Path]) -> None:
    """Taken at its word, -1,024 would send the reader back to the header before, for ever."""
    for size in (-1, -512, -1024, -(2**60)):
        refused(
            tar_of(member("a.png", b"1"), header("b.png", size), END), rf"member 'b\.png' .* has {size} bytes, but only"
        )


@pytest.mark.parametrize(
    "record",
    [
        b"99 path=a.png\n",
        b"14 path=a.png",
        b"13 path=a.png\n",
        b"0 path=a.png\n",
        b"-1 path=a.png\n",
        b"path=a.png\n",
        b"1",
        b" ",
        b"9" * 5000 + b" path=a\n",
        b"12 size=-5\n\n",
        b"12 size=abc\n",
        b"8 size=\n",
        "11 size=²\n".encode(),
        b"5010 size=" + b"9" * 4999 + b"\n",
        b"9" * 100_000,
    ],
    ids=lambda record: repr(record[:15]),
)
def test_a_bad_pax_record_is_refused_x06(tar_of: Callable[..., Path], record: bytes) -> None:
    path = tar_of(member("x", record, tarfile.XHDTYPE), member("a.png", b"1"), END)
    refused(path, "bad PAX (record|size .*) at byte 512")


def test_a_pax_size_beyond_the_file_is_refused_x06(tar_of: Callable[..., Path]) -> None:
    record = b"28 size=1152921504606846976\n"
    refused(
        tar_of(member("x", record, tarfile.XHDTYPE), member("a.png", b"1"), END),
        r"member 'a\.png' .* has \d+ bytes, but only",
    )


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_extended_header_is_refused_x06(tar_of: Callable[..., Path], kind: bytes) -> None:
    path = tar_of(member("x", bytes(2 << 20), kind), member("a.png", b"1"), END)
    refused(path, f"extended header at byte 512 claims {2 << 20} bytes")


def test_very_many_pax_records_take_no_long_x06(tar_of: Callable[..., Path]) -> None:
    """A megabyte of the shortest records; with a copy of the rest for each it took minutes."""
    path = tar_of(member("x", b"3 \n" * 340_000, tarfile.XHDTYPE), member("a.png", b"1"), END)
    began = time.perf_counter()
    assert [m.name for m in members(path)] == ["a.png"]
    assert time.perf_counter() - began < 10


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard .*none\.tar cannot be read: No such file"):
        members(tmp_path / "none.tar")
