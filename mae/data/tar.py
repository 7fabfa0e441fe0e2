"""Strict reader of tar headers.

Python's `tarfile`, and every streaming reader built on it, treats the first damaged header as the end of the
archive and silently loses the samples after it. This reader reads a shard to its proper end, two blocks of zeros
followed only by zeros, or refuses it and names the byte where it is damaged.
"""

import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mae.data.left_out import FOLDERS, LeaveOut, leave_out
from mae.data.store.errors import remedy_for
from mae.errors import UserError

BLOCK = 512
"""Size of a header in bytes; a tar consists of whole blocks."""

_ZEROS = bytes(BLOCK)
# Bytes. PAX and GNU long-name records are a few hundred bytes; a huge one is damage or an attack on memory.
_MAX_RECORD = 1 << 20
# Digits of the largest 64-bit number. Without a limit, int() would refuse thousands of digits with its own error.
_MAX_DIGITS = 20
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_EXTENSION_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *_LONG_NAMES)
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
SYMBOLIC_LINKS = "symbolic links"
_KINDS = {
    tarfile.LNKTYPE: "hard links to a file that is not before them in the tar",
    tarfile.SYMTYPE: SYMBOLIC_LINKS,
    tarfile.DIRTYPE: FOLDERS,
    tarfile.CHRTYPE: "devices",
    tarfile.BLKTYPE: "devices",
    tarfile.FIFOTYPE: "fifos",
    tarfile.GNUTYPE_SPARSE: "sparse files",
}
_OTHER = "members of unknown type"
# PAX records that `_overrides` keeps. One that begins with `_SPARSE` says that zeros are left out of the bytes.
_KEPT = ("path", "linkpath", "size")
_SPARSE = "GNU.sparse."
# No data follow these headers, whatever size they give.
_TYPES_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


class Member(NamedTuple):
    """Regular file of a tar, or a hard link to one before it; its bytes are `tar[offset : offset + size]`."""

    name: str
    offset: int
    size: int


class BadTarError(Exception):
    """Error that says where and how a tar is damaged."""


@contextmanager
def mapped(source: Path | int, name: str = "") -> Iterator[mmap.mmap]:
    """Map a tar, given by path or open descriptor, into memory for `walk`; messages use `name` if it is given.

    Raises:
        UserError: if the file cannot be read, or if the body of the `with` statement raises `BadTarError`.
    """
    try:
        with open(source, "rb", closefd=isinstance(source, Path)) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise BadTarError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                data.madvise(mmap.MADV_SEQUENTIAL)
                yield data
    except OSError as error:
        remedy = remedy_for(error, "check the file and its permissions")
        raise UserError(f"shard {name or source} cannot be read: {error.strerror}; {remedy}") from None
    except BadTarError as error:
        raise UserError(f"shard {name or source} is not a valid tar file: {error}; copy or pack it again") from None


def members(path: Path, name: str = "", leave_out: LeaveOut = leave_out) -> list[Member]:
    """Return the files of the tar at `path`, in order; raises the errors of `mapped`. See `walk`."""
    with mapped(path, name) as data:
        return list(walk(data, leave_out))


def walk(data: mmap.mmap, leave_out: LeaveOut = leave_out) -> Iterator[Member]:
    """Yield the files of a tar, up to its proper end; give everything else to `leave_out`.

    A hard link to a file before it is a file with the same bytes.

    Raises:
        BadTarError: at the first damaged byte.
    """
    if data[:2] == b"\x1f\x8b":
        raise BadTarError("it is gzip data, but its name does not end in .gz")
    if data[:3] == b"\xff\xd8\xff" or data[:4] == b"\x89PNG":
        raise BadTarError("it is an image; pack the folder of images first: mae pack FOLDER --out SHARDS")
    offset = 0
    override: dict[str, str] = {}
    files: dict[str, Member] = {}
    while True:
        block = data[offset : offset + BLOCK]
        if block == _ZEROS:
            _check_end(data, offset)
            return
        header = _header(block, offset, len(data))
        start = offset + BLOCK
        if header.type == tarfile.GNUTYPE_SPARSE:
            start += _map_blocks(data, block, start)
        size = _size(header, override)
        offset = start + -(-size // BLOCK) * BLOCK
        if size < 0 or start + size > len(data):
            raise BadTarError(
                f"member {header.name!r} at byte {start} has {size} bytes, but only {len(data) - start} are present"
            )
        if header.type in _EXTENSION_TYPES:
            if size > _MAX_RECORD:
                raise BadTarError(f"extended header at byte {start} claims {size} bytes")
            if header.type != tarfile.XGLTYPE:
                override |= _overrides(header.type, data[start : start + size], start)
            continue
        if (member := _file(header, override, start, size, files)) is None:
            kind = _KINDS[tarfile.GNUTYPE_SPARSE] if _SPARSE in override else _KINDS.get(header.type, _OTHER)
            leave_out(kind, override.get(_SPARSE) or override.get("path", header.name))
        else:
            files[member.name] = member
            yield member
        override = {}


def _file(
    header: "_Header", override: dict[str, str], start: int, size: int, before: dict[str, Member]
) -> Member | None:
    """Return a member that is a file with bytes of its own, or a hard link to one of those `before` it; else None."""
    name = override.get("path", header.name)
    if header.type in _FILE_TYPES and _SPARSE not in override:
        return Member(name, start, size)
    target = before.get(override.get("linkpath", header.target)) if header.type == tarfile.LNKTYPE else None
    return target and target._replace(name=name)


def member_name(block: bytes) -> str:
    """Return the name in a header; a long name is cut to the length of the header's field.

    Raises:
        BadTarError: if the block is not a header.
    """
    return _header(block, 0, len(block)).name


class _Header(NamedTuple):
    """Fields of one header block of 512 bytes."""

    name: str
    type: bytes
    size: int
    target: str = ""
    """Name of the file that a link stands for."""


def _header(block: bytes, offset: int, total: int) -> _Header:
    if len(block) < BLOCK:
        raise BadTarError(f"it ends at byte {total} without the end-of-archive mark")
    return _plain_header(block) or _any_header(block, offset)


# A header with no special features: size, time, checksum, type 0, no name prefix.
_PLAIN = re.compile(rb".{124}([0-7]{11})[\0 ].{12}([0-7]{6})..0.{188}\0", re.DOTALL)


def _plain_header(block: bytes) -> _Header | None:
    """Read the usual kind of header, four times as fast as tarfile; return None for any other kind."""
    found = _PLAIN.match(block)
    # The eight bytes of the checksum count as blanks.
    if not found or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(found[2], 8):
        return None
    return _Header(_name(block), tarfile.REGTYPE, int(found[1], 8))


def _any_header(block: bytes, offset: int) -> _Header:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadTarError(f"bad header at byte {offset} ({error})") from None
    # In GNU's format, what follows the name's 100 bytes is no prefix of it, but times and offsets.
    name = _name(block) if block[257:265] == tarfile.GNU_MAGIC else header.name
    return _Header(name, header.type, header.size, header.linkname)


def _name(block: bytes) -> str:
    return block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _size(header: _Header, override: dict[str, str]) -> int:
    """Return the bytes that follow a header. A size in a PAX record applies to the file, not to records in between."""
    if header.type in _TYPES_WITHOUT_DATA:
        return 0
    if header.type in _EXTENSION_TYPES:
        return header.size
    return int(override.get("size", header.size))


def _map_blocks(data: mmap.mmap, block: bytes, start: int) -> int:
    """Return the bytes of the further blocks of a sparse file's map, which its size does not count."""
    end, more = start, block[482:483]
    while more.strip(b"\0") and end < len(data):
        more, end = data[end + 504 : end + 505], end + BLOCK
    return end - start


def _check_end(data: mmap.mmap, offset: int) -> None:
    if data[offset + BLOCK : offset + 2 * BLOCK] != _ZEROS:
        raise BadTarError(f"a single block of zeros at byte {offset} instead of a header or the end-of-archive mark")
    rest = data[offset + 2 * BLOCK :]
    if rest.count(0) != len(rest):
        raise BadTarError(f"data follows the end-of-archive mark at byte {offset}")
    if offset == 0 and len(data) > tarfile.RECORDSIZE:  # an empty tar is at most one record; more zeros are lost data
        raise BadTarError(f"it holds {len(data)} zeros and nothing else")


def _overrides(kind: bytes, record: bytes, offset: int) -> dict[str, str]:
    """Return what a PAX or GNU long-name record says of the next member: name, target and size, and if it is sparse."""
    if kind in _LONG_NAMES:
        return {_LONG_NAMES[kind]: record.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    position, end = 0, len(record.rstrip(b"\0"))
    while position < end:
        digits = record[position : position + _MAX_DIGITS].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        line = record[position : position + length]
        if not 0 < length == len(line) or not line.endswith(b"\n"):
            raise BadTarError(f"bad PAX record at byte {offset}")
        keyword, _, value = line[len(digits) + 1 : -1].partition(b"=")
        found[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += length
    if not re.fullmatch(rf"[0-9]{{1,{_MAX_DIGITS}}}", found.get("size", "0")):
        raise BadTarError(f"bad PAX size {found['size'][:_MAX_DIGITS]!r} at byte {offset}")
    sparse = {_SPARSE: found.get(f"{_SPARSE}name", "")} if any(name.startswith(_SPARSE) for name in found) else {}
    return {name: found[name] for name in _KEPT if name in found} | sparse
