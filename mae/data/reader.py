"""Reader of images by sample id; it compares each image with the crc32 of the index."""

import errno
import os
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae.data.index import ShardIndex
from mae.data.scan import Records
from mae.data.store.errors import remedy_for
from mae.data.store.range_cache import RangeCache
from mae.data.store.storage import Shard
from mae.data.store.unpacked import is_gzipped, plain_tar, unpacked_bytes
from mae.data.tar import BLOCK, BadTarError, member_name
from mae.errors import UserError

# A process may often open only 1,024 files, and a set may have more shards than that.
_MAX_OPEN = 256
_STEPS_AHEAD = 8
# A network file system may lose a file for a moment.
_SECONDS_BEFORE_RETRIES = (0.1, 1.0, 5.0)
# These do not pass by waiting.
_LASTING = (errno.EACCES, errno.EPERM, errno.ELOOP)


class Location(NamedTuple):
    """Position of one image."""

    sample_id: int
    shard: int
    offset: int
    size: int
    crc32: int


class _ByteRange(NamedTuple):
    """Range of bytes of a shard that is opened at once: all of a local shard, or one chunk of a remote shard."""

    shard: int
    start: int
    """Offset of the first byte."""
    stop: int
    """Offset after the last byte; 0 for a whole local file."""
    samples: tuple[int, int]
    """First sample id, and the id after the last; (0, 0) for a local file."""


class ImageReader:
    """Reader of the images of an index; threads and forked processes may share it.

    Remote shards are fetched in chunks of `chunk_samples` samples, through a cache of at most `cache_bytes` that the
    processes of a node share; copies of whole shards count first.
    """

    def __init__(self, index: ShardIndex, cache_dir: Path, cache_bytes: float, chunk_samples: int = 64) -> None:
        self.index = index
        self.is_remote = any(entry.shard.is_remote for entry in index.entries)
        self._files = [_local_file(entry.shard, cache_dir, cache_bytes) for entry in index.entries]
        self._whole = [None if file is None else _ByteRange(n, 0, 0, (0, 0)) for n, file in enumerate(self._files)]
        room = cache_bytes - unpacked_bytes(cache_dir) if self.is_remote else cache_bytes
        self._cache = RangeCache(cache_dir / "ranges", max(0, int(room)))
        self._chunk = chunk_samples
        self._open: dict[_ByteRange, _Descriptor] = {}
        self._lost_shards: set[int] = set()  # their next images are not waited for as long
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def locate(self, sample_ids: NDArray[np.int64]) -> list[Location]:
        """Return the positions of the images of these samples."""
        records = self.index.records[sample_ids]
        columns = sample_ids, self.index.shard_of(sample_ids), *(records[name] for name in ("offset", "size", "crc32"))
        return list(map(Location._make, zip(*(column.tolist() for column in columns), strict=True)))

    def read(self, place: Location) -> bytes:
        """Return the bytes of one image, unchanged since it was indexed.

        Raises:
            UserError: if they cannot be read or have changed; the message does not name the image.
        """
        data = self._read_with_retries(place)
        if len(data) != place.size:
            raise UserError("the shard has become shorter since it was indexed; restore it")
        if (found := zlib.crc32(data)) != place.crc32:
            raise UserError(
                f"its crc32 is {found:08x}, but was {place.crc32:08x} when it was indexed: the shard is damaged or has "
                "changed; restore it, or index it again for a new run"
            )
        return data

    def steps_ahead(self, horizon: int) -> tuple[int, ...]:
        """Return how many steps ahead of a batch to call `will_need` for it.

        A few steps are enough for a disk. Remote shards are also fetched a whole window of `horizon` steps ahead; for
        the first window it is too late for that.
        """
        return (_STEPS_AHEAD, horizon) if self.is_remote and horizon > _STEPS_AHEAD else (_STEPS_AHEAD,)

    def will_need(self, sample_ids: NDArray[np.int64]) -> None:
        """Prefetch these images: from disk into memory, or from a remote store to disk."""
        fetched: set[_ByteRange] = set()
        for place in self.locate(sample_ids):
            byte_range = self._range_of(place)
            if not byte_range.stop:
                self._read_ahead(byte_range, place)
            elif byte_range not in fetched:
                fetched.add(byte_range)
                shard = self.index.entries[byte_range.shard].shard
                self._cache.prefetch(shard, byte_range.start, byte_range.stop, self._verifier(byte_range))

    def name(self, sample_id: int) -> str:
        """Return the name of an image for messages: `shard.tar: key.jpg`."""
        (place,) = self.locate(np.array([sample_id]))
        shard = self.index.entries[place.shard].shard
        try:
            return f"{shard}: {_on_one_line(member_name(self._bytes(place, place.offset - BLOCK, BLOCK)))}"
        except (OSError, BadTarError, UserError):
            return f"{shard}: the image at byte {place.offset}"

    def _bytes(self, place: Location, offset: int, size: int) -> bytes:
        byte_range = self._range_of(place)
        # The local name keeps the file open while it is read; another thread may remove it from `_open`.
        descriptor = self._descriptor(byte_range)
        return os.pread(descriptor.number, size, offset - byte_range.start)

    def _read_with_retries(self, place: Location) -> bytes:
        for seconds in () if place.shard in self._lost_shards else _SECONDS_BEFORE_RETRIES:
            try:
                return self._bytes(place, place.offset, place.size)
            except OSError as error:
                with self._lock:
                    self._open.pop(self._range_of(place), None)
                if error.errno in _LASTING:
                    break
                time.sleep(seconds)
        try:
            data = self._bytes(place, place.offset, place.size)
        except OSError as error:
            self._lost_shards.add(place.shard)
            remedy = remedy_for(error, "restore it")
            raise UserError(f"the shard cannot be read: {error.strerror}; {remedy}") from None
        self._lost_shards.discard(place.shard)
        return data

    def _range_of(self, place: Location) -> _ByteRange:
        """Return the range of its shard that contains a sample."""
        whole = self._whole[place.shard]
        if whole is not None:
            return whole
        chunk = place.sample_id // self._chunk
        starts, records = self.index.starts, self.index.records
        first = max(chunk * self._chunk, int(starts[place.shard]))
        stop = min((chunk + 1) * self._chunk, int(starts[place.shard + 1]))
        # A hard link lies where its target does, so the samples need not be in the order of their bytes.
        begin = int(records["offset"][first:stop].min())
        end = int((records["offset"][first:stop] + records["size"][first:stop]).max())
        # It begins with the header of the first image, which has its name.
        return _ByteRange(place.shard, begin - BLOCK, end, (first, stop))

    def _verifier(self, byte_range: _ByteRange) -> Callable[[bytes], str | None]:
        return partial(_find_damage, self.index.records[slice(*byte_range.samples)], byte_range.start)

    def _read_ahead(self, byte_range: _ByteRange, place: Location) -> None:
        try:
            descriptor = self._descriptor(byte_range)
            os.posix_fadvise(descriptor.number, place.offset, place.size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # `read` reports the same error

    def _descriptor(self, byte_range: _ByteRange) -> "_Descriptor":
        """Return the open file of a range; a file in use by another thread stays open until it is read."""
        found = self._open.get(byte_range)
        if found is None:
            # Outside the lock, because a download may take long and other threads need other ranges.
            found = _Descriptor(self._open_range(byte_range))
            with self._lock:
                while len(self._open) >= _MAX_OPEN:
                    del self._open[next(iter(self._open))]
                self._open[byte_range] = found
        return found

    def _open_range(self, byte_range: _ByteRange) -> int:
        path = self._files[byte_range.shard]
        if path is not None:
            return os.open(path, os.O_RDONLY)
        shard = self.index.entries[byte_range.shard].shard
        return self._cache.fetch(shard, byte_range.start, byte_range.stop, self._verifier(byte_range))


def _local_file(shard: Shard, cache_dir: Path, cache_bytes: float) -> Path | None:
    """Return the path of the plain tar to read; None for a remote shard that is read in ranges."""
    return None if shard.is_remote and not is_gzipped(shard) else plain_tar(shard, cache_dir, cache_bytes)


def _on_one_line(name: str) -> str:
    """Escape the unprintable characters of a name from a tar; surrogates stand for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in name)


class _Descriptor:
    """File descriptor that is closed with its last reference."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _find_damage(records: Records, start: int, data: bytes) -> str | None:
    """Return why the bytes from offset `start` do not contain the images of `records`, or None if they do."""
    for offset, size, crc32, _ in records.tolist():
        if zlib.crc32(data[offset - start : offset - start + size]) != crc32:
            return f"the crc32 of the image at byte {offset} has changed since it was indexed"
    return None
