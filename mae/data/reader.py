"""Bytes of images by sample id, each checked against the crc32 of the index."""

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
from mae.data.store.remote import RangeCache
from mae.data.store.shards import Shard, is_gzipped, plain_tar
from mae.data.tar import BLOCK, BadTarError, member_name
from mae.errors import UserError

# A process may often open only 1,024 files, and a set may have more shards than that.
_OPEN_AT_MOST = 256
_STEPS_AHEAD = 8
# Network file systems lose a file for a moment now and then.
_SECONDS_BEFORE_RETRIES = (0.1, 1.0, 5.0)


class Location(NamedTuple):
    """Where one image lies."""

    sample_id: int
    shard: int
    offset: int
    size: int
    crc32: int


class _Piece(NamedTuple):
    """Bytes of a shard that are opened as one: all of a local shard, the samples of a chunk of a remote one."""

    shard: int
    start: int
    """First byte."""
    stop: int
    """Byte after the last; 0 for all of a local file."""
    samples: tuple[int, int]
    """First sample id and the one after the last; nothing for a local file."""


class ImageReader:
    """Reads the images of an index; any number of threads and forked processes may share one.

    Remote shards come in pieces of `chunk_samples` samples, through a cache of at most `cache_bytes` that the
    processes of a node share.
    """

    def __init__(self, index: ShardIndex, cache_dir: Path, cache_bytes: float = 100e9, chunk_samples: int = 64) -> None:
        self.index = index
        self.is_remote = any(entry.shard.is_remote for entry in index.entries)
        self._files = [_local_file(entry.shard, cache_dir) for entry in index.entries]
        self._whole = [None if file is None else _Piece(n, 0, 0, (0, 0)) for n, file in enumerate(self._files)]
        self._cache = RangeCache(cache_dir / "ranges", int(cache_bytes))
        self._chunk = chunk_samples
        self._open: dict[_Piece, _Descriptor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def locate(self, sample_ids: NDArray[np.int64]) -> list[Location]:
        """Where the images of these samples lie."""
        records = self.index.records[sample_ids]
        columns = (
            sample_ids,
            self.index.shard_of(sample_ids),
            *(records[name] for name in ("offset", "size", "crc32")),
        )
        return list(map(Location._make, zip(*(column.tolist() for column in columns), strict=True)))

    def read(self, place: Location) -> bytes:
        """The bytes of one image, as they were when the index was made.

        Raises:
            UserError: if they cannot be read, or are others now; without the image's name.
        """
        data = self._with_patience(place)
        if len(data) != place.size:
            raise UserError("the shard has become shorter since it was indexed; restore it")
        if (found := zlib.crc32(data)) != place.crc32:
            raise UserError(
                f"its crc32 is {found:08x}, {place.crc32:08x} when it was indexed: the shard is damaged or was "
                "changed; restore it, or index it again for a new run"
            )
        return data

    def steps_ahead(self, horizon: int) -> tuple[int, ...]:
        """How many steps ahead `will_need` should be told of a batch.

        A disk needs some batches; remote shards are fetched a whole window, of `horizon` steps, before they are used,
        and those of the first window, for which it is too late, as early as can be.
        """
        return (_STEPS_AHEAD, horizon) if self.is_remote and horizon > _STEPS_AHEAD else (_STEPS_AHEAD,)

    def will_need(self, sample_ids: NDArray[np.int64]) -> None:
        """Have these images brought near: into the memory of this machine, or from a remote store to its disk."""
        fetched: set[_Piece] = set()
        for place in self.locate(sample_ids):
            piece = self._piece(place)
            if not piece.stop:
                self._read_ahead(piece, place)
            elif piece not in fetched:
                fetched.add(piece)
                shard = self.index.entries[piece.shard].shard
                self._cache.prefetch(shard, piece.start, piece.stop, self._verifier(piece))

    def name(self, sample_id: int) -> str:
        """`shard.tar: key.jpg`, to tell a person which image is meant."""
        (place,) = self.locate(np.array([sample_id]))
        shard = self.index.entries[place.shard].shard
        try:
            return f"{shard}: {_on_one_line(member_name(self._bytes(place, place.offset - BLOCK, BLOCK)))}"
        except (OSError, BadTarError, UserError):
            return f"{shard}: the image at byte {place.offset}"

    def _bytes(self, place: Location, offset: int, size: int) -> bytes:
        piece = self._piece(place)
        # Held by name until the bytes are there: another thread may push it out of the open ones.
        descriptor = self._descriptor(piece)
        return os.pread(descriptor.number, size, offset - piece.start)

    def _with_patience(self, place: Location) -> bytes:
        for seconds in _SECONDS_BEFORE_RETRIES:
            try:
                return self._bytes(place, place.offset, place.size)
            except OSError:
                with self._lock:
                    self._open.pop(self._piece(place), None)
                time.sleep(seconds)
        try:
            return self._bytes(place, place.offset, place.size)
        except OSError as error:
            raise UserError(f"the shard cannot be read: {error.strerror}; restore it") from None

    def _piece(self, place: Location) -> _Piece:
        """The piece of its shard that holds a sample."""
        whole = self._whole[place.shard]
        if whole is not None:
            return whole
        chunk = place.sample_id // self._chunk
        starts, records = self.index.starts, self.index.records
        first = max(chunk * self._chunk, int(starts[place.shard]))
        stop = min((chunk + 1) * self._chunk, int(starts[place.shard + 1]))
        begin, last = records[first], records[stop - 1]
        # With the header of the first image, for its name.
        return _Piece(place.shard, int(begin["offset"]) - BLOCK, int(last["offset"]) + int(last["size"]), (first, stop))

    def _verifier(self, piece: _Piece) -> Callable[[bytes], str | None]:
        return partial(_wrong_image, self.index.records[slice(*piece.samples)], piece.start)

    def _read_ahead(self, piece: _Piece, place: Location) -> None:
        try:
            descriptor = self._descriptor(piece)
            os.posix_fadvise(descriptor.number, place.offset, place.size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # `read` meets the same error, and tells

    def _descriptor(self, piece: _Piece) -> "_Descriptor":
        """The open file of a piece; one that another thread still reads stays open until that is done."""
        found = self._open.get(piece)
        if found is None:
            # Outside the lock: a download may take long, and other threads need other pieces.
            found = _Descriptor(self._open_piece(piece))
            with self._lock:
                while len(self._open) >= _OPEN_AT_MOST:
                    del self._open[next(iter(self._open))]
                self._open[piece] = found
        return found

    def _open_piece(self, piece: _Piece) -> int:
        path = self._files[piece.shard]
        if path is not None:
            return os.open(path, os.O_RDONLY)
        shard = self.index.entries[piece.shard].shard
        return self._cache.fetch(shard, piece.start, piece.stop, self._verifier(piece))


def _local_file(shard: Shard, cache_dir: Path) -> Path | None:
    """The plain tar to read; None for one that is read where it lies, piece by piece."""
    return None if shard.is_remote and not is_gzipped(shard) else plain_tar(shard, cache_dir)


def _on_one_line(name: str) -> str:
    """A name from a tar may hold anything; surrogates stand for its bytes that are no UTF-8."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in name)


class _Descriptor:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _wrong_image(records: Records, start: int, data: bytes) -> str | None:
    """What is wrong with bytes from `start` that should hold the images of `records`."""
    for offset, size, crc32, _ in records.tolist():
        if zlib.crc32(data[offset - start : offset - start + size]) != crc32:
            return f"the image at byte {offset} has another crc32 than when it was indexed"
    return None
