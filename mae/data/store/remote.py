"""Remote shards near at hand: a cache of byte ranges that the processes of a node share, and whole downloads.

A range lies in `folder/<hash of the object>/<start>-<stop>`. It appears there whole, by rename; until then it
is `<start>-<stop>.part`, locked by the process that downloads it. The lock dies with its holder, so after a
kill -9 the next one that needs the range takes the part over, or whoever makes room removes it.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO, NamedTuple, TypeAlias

from mae.data.store import storage
from mae.data.store.connection import RangesIgnoredError, TransientError, retried, stream
from mae.data.store.storage import Shard, check_not_replaced, read_range
from mae.errors import UserError

Verify = Callable[[bytes], str | None]
"""Says what is wrong with the bytes of a range, or None."""

PREFETCH_THREADS = 4
DOWNLOAD_BLOCK = 16 << 20
DOWNLOADS_AT_ONCE = 4
# Making room looks at every file of the cache, so it makes some more than is needed at once.
_FILL_AFTER_EVICTION = 0.9
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PART = ".part"

_Wanted: TypeAlias = tuple[Path, Shard, int, int, Verify]


class _Piece(NamedTuple):
    """A whole range in the cache; the one used longest ago sorts first."""

    used_ns: int
    size: int
    path: Path


class RangeCache:
    """Byte ranges of remote shards as local files, at most `budget` bytes of them in `folder`.

    What was used longest ago makes room for what is new. Ranges that are being downloaded count, and may
    exceed the budget for as long as they are. Descriptors stay valid when their range is removed.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._process = 0
        self._wanted = SimpleQueue[_Wanted]()
        self._pending = set[Path]()

    def fetch(self, shard: Shard, start: int, stop: int, verify: Verify) -> int:
        """A descriptor, to be closed by the caller, of a file that holds bytes start..stop of `shard`.

        One process of the node downloads the range, the others wait for it.

        Raises:
            UserError: if the range cannot be had: see `storage.read_range`; or if it cannot be kept here.
        """
        if stop - start > self.budget:
            raise UserError(
                f"the cache of remote shards may hold {self.budget} bytes, but one range of {shard} has "
                f"{stop - start}; give it room for some dozens"
            )
        path = self._path(shard, start, stop)
        try:
            while True:
                descriptor = _open_whole(path, stop - start)
                if descriptor is None:
                    descriptor = self._download(path, shard, start, stop, verify)
                if descriptor is not None:
                    return descriptor
        except RangesIgnoredError:
            raise UserError(
                f"the server of {shard} sends the whole file when asked for a part; "
                "set data.reader to stream, which reads from front to back"
            ) from None
        except OSError as error:
            raise UserError(
                f"the cache of remote shards {self.folder} cannot be used: {error.strerror or error}; "
                "set data.cache_dir to another folder"
            ) from None

    def prefetch(self, shard: Shard, start: int, stop: int, verify: Verify) -> None:
        """Have the range fetched in the background; an error is met again by `fetch`."""
        if self._process != os.getpid():
            self._start_threads()
        path = self._path(shard, start, stop)
        if path not in self._pending:
            self._pending.add(path)
            self._wanted.put((path, shard, start, stop, verify))

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "budget": self.budget}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start_threads(self) -> None:
        """Begin anew in each process: threads do not live through a fork, and a queue's lock may not either."""
        self._process, self._wanted, self._pending = os.getpid(), SimpleQueue(), set()
        for _ in range(PREFETCH_THREADS):
            Thread(target=self._fetch_wanted, daemon=True).start()

    def _fetch_wanted(self) -> None:
        while True:
            path, shard, start, stop, verify = self._wanted.get()
            with suppress(Exception):  # met again by fetch, in the thread that needs the range
                os.close(self.fetch(shard, start, stop, verify))
            self._pending.discard(path)

    def _path(self, shard: Shard, start: int, stop: int) -> Path:
        identity = f"{shard.url}\0{shard.size}\0{shard.version}".encode("utf-8", "surrogateescape")
        return self.folder / hashlib.sha256(identity).hexdigest()[:20] / f"{start}-{stop}"

    def _download(self, path: Path, shard: Shard, start: int, stop: int, verify: Verify) -> int | None:
        """The descriptor of the range, now in place; None if another process has put it there, or it is gone."""
        descriptor = _claim(path)
        if descriptor is None:
            return None
        part = _part_of(path)
        try:
            self._write(descriptor, read_range(shard, start, stop, verify))
            part.rename(path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            _unlock_and_close(descriptor)
            if isinstance(error, FileNotFoundError):  # someone has emptied the cache
                return None
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor

    def _write(self, descriptor: int, data: bytes) -> None:
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
            _unlock_and_close(descriptor)

    def _survey(self) -> tuple[list[_Piece], int]:
        """The whole ranges in the cache, the one used longest ago first, and the bytes of all, whole or not."""
        pieces, total = [], 0
        for entry in (entry for folder in os.scandir(self.folder) if folder.is_dir() for entry in os.scandir(folder)):
            match = re.fullmatch(rf"([0-9]+)-([0-9]+)({re.escape(_PART)})?", entry.name)
            if not match or (match[3] and _remove_if_abandoned(Path(entry.path))):
                continue
            size = int(match[2]) - int(match[1])
            total += size
            if not match[3]:
                with suppress(FileNotFoundError):
                    pieces.append(_Piece(entry.stat().st_mtime_ns, size, Path(entry.path)))
        return sorted(pieces), total


def download(shard: Shard, file: BinaryIO) -> None:
    """Write a whole remote shard into the empty, seekable `file`.

    It is read in blocks, several ahead, so that a break costs one block; from a server without ranges it is
    read in one go, and begun again after a break.

    Raises:
        UserError: as `read_range`.
    """
    try:
        for block in _blocks(shard):
            file.write(block)
    except RangesIgnoredError:
        retried(shard.url, lambda: _copy_in_one_go(shard, file))
    retried(shard.url, lambda: check_not_replaced(shard))


def _blocks(shard: Shard) -> Iterator[bytes]:
    spans = ((at, min(at + DOWNLOAD_BLOCK, shard.size)) for at in range(0, shard.size, DOWNLOAD_BLOCK))
    pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE)
    try:
        pending: deque[Future[bytes]] = deque(
            pool.submit(read_range, shard, *span) for span in islice(spans, DOWNLOADS_AT_ONCE)
        )
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(read_range, shard, *span) for span in islice(spans, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _copy_in_one_go(shard: Shard, file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()
    for chunk in stream(shard.url, storage.STALL_SECONDS):
        file.write(chunk)
    if file.tell() != shard.size:
        check_not_replaced(shard)
        raise TransientError(f"{file.tell()} of {shard.size} bytes came")


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


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor of the range at `path`, marked as just used; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size == size:
        os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    path.unlink(missing_ok=True)
    return None


def _claim(path: Path) -> int | None:
    """A locked descriptor of the part of `path`; None if meanwhile the whole is there, or everything is gone."""
    part = _part_of(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # making room took the folder away
        return None
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _is_named(descriptor, part):
        if not path.exists():
            return descriptor
        part.unlink()
    _unlock_and_close(descriptor)
    return None


def _remove_if_abandoned(part: Path) -> bool:
    """Remove a part whose holder is dead; False if it lives."""
    try:
        descriptor = os.open(part, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    if _is_named(descriptor, part):
        part.unlink()
    _unlock_and_close(descriptor)
    return True


def _unlock_and_close(descriptor: int) -> None:
    """To close is not enough: a process forked meanwhile has the descriptor too, and with it the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: another process may have renamed or removed it before the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _read_number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0)
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, number: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(number).encode(), 0)
