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

from mae.errors import UserError

BLOCK = 512
"""Size of a header in bytes; a tar consists of whole blocks."""

_ZEROS = bytes(BLOCK)
# Bytes. PAX and GNU long-name records are a few hundred bytes; a huge one is damage or an attack on memory.
_MAX_RECORD = 1 << 20
# Digits of the largest 64-bit number. Without a limit, int() would refuse thousands of digits with its own error.
_MAX_DIGITS = 20
_EXTENSION_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
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
    """Regular file of a tar; its bytes are `tar[offset : offset + size]`."""

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
        raise UserError(f"shard {name or source} cannot be read: {error.strerror}") from None
    except BadTarError as error:
        raise UserError(f"shard {name or source} is not a valid tar file: {error}; copy or pack it again") from None


def members(path: Path, name: str = "") -> list[Member]:
    """Return the regular files of the tar at `path`, in order; raises the errors of `mapped`."""
    with mapped(path, name) as data:
        return list(walk(data))


def walk(data: mmap.mmap) -> Iterator[Member]:
    """Yield the regular files of a tar, up to its proper end.

    Raises:
        BadTarError: at the first damaged byte.
    """
    if data[:2] == b"\x1f\x8b":
        raise BadTarError("it is gzip data, but its name does not end in .gz")
    offset = 0
    override: dict[str, str] = {}
    while True:
        block = data[offset : offset + BLOCK]
        if block == _ZEROS:
            _check_end(data, offset)
            return
        header = _header(block, offset, len(data))
        start = offset + BLOCK
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
        if header.type in tarfile.REGULAR_TYPES:
            yield Member(override.get("path", header.name), start, size)
        override = {}


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
    name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return _Header(name, tarfile.REGTYPE, int(found[1], 8))


def _any_header(block: bytes, offset: int) -> _Header:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadTarError(f"bad header at byte {offset} ({error})") from None
    return _Header(header.name, header.type, header.size)


def _size(header: _Header, override: dict[str, str]) -> int:
    """Return the bytes that follow a header. A size in a PAX record applies to the file, not to records in between."""
    if header.type in _TYPES_WITHOUT_DATA:
        return 0
    if header.type in _EXTENSION_TYPES:
        return header.size
    return int(override.get("size", header.size))


def _check_end(data: mmap.mmap, offset: int) -> None:
    if data[offset + BLOCK : offset + 2 * BLOCK] != _ZEROS:
        raise BadTarError(f"a single block of zeros at byte {offset} instead of a header or the end-of-archive mark")
    rest = data[offset + 2 * BLOCK :]
    if rest.count(0) != len(rest):
        raise BadTarError(f"data follows the end-of-archive mark at byte {offset}")


def _overrides(kind: bytes, record: bytes, offset: int) -> dict[str, str]:
    """Return the name and size that a PAX or GNU long-name record gives to the next member."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": record.rstrip(b"\0").decode("utf-8", "surrogateescape")}
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
    return {name: found[name] for name in ("path", "size") if name in found}
