"""Disk space of the range cache: a budget in bytes that the processes of a node share."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mae.data.store.range_files import PART, remove_if_abandoned, unlock_and_close
from mae.errors import UserError

# Eviction lists every file of the cache, so it frees more than the next range needs.
_FILL_AFTER_EVICTION = 0.9
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _CachedRange(NamedTuple):
    """Complete range in the cache; the least recently used sorts first."""

    used_ns: int
    size: int
    path: Path


@dataclass(frozen=True)
class CacheSpace:
    """Budget of at most `budget` bytes of ranges in `folder`."""

    folder: Path
    budget: int

    def write(self, descriptor: int, data: bytes) -> None:
        """Write `data` into an open part; evict the least recently used ranges to make room.

        Raises:
            UserError: if the disk is full and no range is left to evict.
        """
        self._reserve(len(data))
        while True:
            try:
                os.ftruncate(descriptor, 0)
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, memoryview(data)[written:], written)
                os.fsync(descriptor)  # otherwise a crash could leave a file of the right length without its bytes
                return
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
            self._free_disk(len(data))

    def _reserve(self, size: int) -> None:
        """Count `size` more bytes, and evict ranges if they would exceed the budget."""
        with self._locked_count() as count:
            reserved = _read_number(count)
            if reserved is None or reserved + size > self.budget:
                ranges, total = self._list()  # includes the part for these bytes
                _write_number(count, _evict(ranges, total, self.budget, int(self.budget * _FILL_AFTER_EVICTION)))
            else:
                _write_number(count, reserved + size)

    def _free_disk(self, size: int) -> None:
        with self._locked_count() as count:
            ranges, total = self._list()
            if not ranges:
                raise UserError(
                    f"the disk of the cache of remote shards is full: {self.folder} needs {size} bytes, "
                    f"{shutil.disk_usage(self.folder).free} are free; set data.cache_dir to a larger disk"
                )
            _write_number(count, _evict(ranges, total, total - 1, total - 2 * size))

    @contextmanager
    def _locked_count(self) -> Iterator[int]:
        """Lock the file with the number of reserved bytes; eviction corrects it after a process was killed."""
        descriptor = os.open(self.folder / "bytes", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            unlock_and_close(descriptor)

    def _list(self) -> tuple[list[_CachedRange], int]:
        """Return the complete ranges, least recently used first, and the bytes of all ranges and parts."""
        ranges, total = [], 0
        for entry in (entry for folder in os.scandir(self.folder) if folder.is_dir() for entry in os.scandir(folder)):
            match = re.fullmatch(rf"([0-9]+)-([0-9]+)({re.escape(PART)})?", entry.name)
            if not match or (match[3] and remove_if_abandoned(Path(entry.path))):
                continue
            size = int(match[2]) - int(match[1])
            total += size
            if not match[3]:
                with suppress(FileNotFoundError):
                    ranges.append(_CachedRange(entry.stat().st_mtime_ns, size, Path(entry.path)))
        return sorted(ranges), total


def _evict(ranges: list[_CachedRange], total: int, limit: int, target: int) -> int:
    """Remove ranges until at most `target` bytes are left, if `total` exceeds `limit`; return the bytes left."""
    if total > limit:
        for cached in ranges:
            if total <= target:
                break
            cached.path.unlink(missing_ok=True)
            total -= cached.size
            with suppress(OSError):  # other ranges are in the folder
                cached.path.parent.rmdir()
    return total


def _read_number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, number: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(number).encode(), 0)
