"""Disk space of the range cache: a budget that all processes of a node share."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mae.data.store.range_files import PART, remove_if_abandoned, unlock_and_close
from mae.errors import UserError

# Making room looks at every file of the cache, so it makes some more than is needed at once.
_FILL_AFTER_EVICTION = 0.9
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class _Piece(NamedTuple):
    """A whole range in the cache; the one used longest ago sorts first."""

    used_ns: int
    size: int
    path: Path


class CacheSpace:
    """At most `budget` bytes of ranges in `folder`."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget

    def write(self, descriptor: int, data: bytes) -> None:
        """Write `data` into a part, and remove ranges to make room for it.

        Raises:
            UserError: if the disk is full and there is no range left to remove.
        """
        self._make_room(len(data))
        while True:
            try:
                os.ftruncate(descriptor, 0)
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, memoryview(data)[written:], written)
                os.fsync(descriptor)  # or a crash of the machine leaves a file of the right length without its bytes
                return
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
            self._make_room_on_full_disk(len(data))

    def _make_room(self, size: int) -> None:
        """Book `size` bytes, and remove ranges if the budget would be exceeded."""
        with self._bookkeeping() as books:
            booked = _read_number(books)
            if booked is None or booked + size > self.budget:
                pieces, total = self._survey()  # the part for these bytes is among them
                _write_number(books, _evict(pieces, total, self.budget, int(self.budget * _FILL_AFTER_EVICTION)))
            else:
                _write_number(books, booked + size)

    def _make_room_on_full_disk(self, size: int) -> None:
        with self._bookkeeping() as books:
            pieces, total = self._survey()
            if not pieces:
                raise UserError(
                    f"the disk of the cache of remote shards is full: {self.folder} needs {size} bytes, "
                    f"{shutil.disk_usage(self.folder).free} are free; set data.cache_dir to a larger disk"
                )
            _write_number(books, _evict(pieces, total, total - 1, total - 2 * size))

    @contextmanager
    def _bookkeeping(self) -> Iterator[int]:
        """The file with the number of bytes booked, locked; kill -9 leaves too much in it, the next survey mends it."""
        descriptor = os.open(self.folder / "bytes", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            unlock_and_close(descriptor)

    def _survey(self) -> tuple[list[_Piece], int]:
        """The whole ranges in the cache, the one used longest ago first, and the bytes of all, whole or not."""
        pieces, total = [], 0
        for entry in (entry for folder in os.scandir(self.folder) if folder.is_dir() for entry in os.scandir(folder)):
            match = re.fullmatch(rf"([0-9]+)-([0-9]+)({re.escape(PART)})?", entry.name)
            if not match or (match[3] and remove_if_abandoned(Path(entry.path))):
                continue
            size = int(match[2]) - int(match[1])
            total += size
            if not match[3]:
                with suppress(FileNotFoundError):
                    pieces.append(_Piece(entry.stat().st_mtime_ns, size, Path(entry.path)))
        return sorted(pieces), total


def _evict(pieces: list[_Piece], total: int, limit: int, target: int) -> int:
    """If `total` bytes are above `limit`, remove ranges until `target` is reached; return the bytes that are left."""
    if total > limit:
        for piece in pieces:
            if total <= target:
                break
            piece.path.unlink(missing_ok=True)
            total -= piece.size
            with suppress(OSError):  # it holds other ranges
                piece.path.parent.rmdir()
    return total


def _read_number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, number: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(number).encode(), 0)
