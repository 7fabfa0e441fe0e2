"""Cache of byte ranges of remote shards, shared by the processes of a node.

A complete range is the file `folder/<hash of the object>/<start>-<stop>`. While it is being downloaded it is
`<start>-<stop>.part`, locked by the downloading process, and a rename completes it. If that process is killed, its
lock is released: the next process that needs the range downloads the part again, or eviction removes it.
"""

import fcntl
import hashlib
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

from mae.data.store.cache_space import CacheSpace
from mae.data.store.errors import RangesIgnoredError
from mae.data.store.range_files import lock_part, open_range, part_of, unlock_and_close
from mae.data.store.storage import Shard, read_range
from mae.errors import UserError

Verify = Callable[[bytes], str | None]
"""Function that returns what is wrong with the bytes of a range, or None."""

PREFETCH_THREADS = 4

_Request: TypeAlias = tuple[Path, Shard, int, int, Verify]


class RangeCache:
    """Byte ranges of remote shards as local files: at most `budget` bytes of them in `folder`.

    New ranges replace the least recently used ones. Ranges that are being downloaded count too, and may exceed the
    budget until they are complete. An open descriptor stays valid when its range is removed.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._space = CacheSpace(folder, budget)
        self._process = 0
        self._requests = SimpleQueue[_Request | None]()
        self._pending = set[Path]()

    def fetch(self, shard: Shard, start: int, stop: int, verify: Verify) -> int:
        """Return a descriptor of a file that holds bytes start..stop of `shard`; the caller closes it.

        One process of the node downloads the range, and the others wait for it.

        Raises:
            UserError: if the range cannot be read (see `storage.read_range`) or stored.
        """
        if stop - start > self.budget:
            raise UserError(
                f"the cache of remote shards is limited to {self.budget} bytes, but one range of {shard} has "
                f"{stop - start}; set data.cache_bytes to several dozen times that"
            )
        path = self._path(shard, start, stop)
        try:
            while True:
                descriptor = open_range(path, stop - start)
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
        """Download the range in the background; if that fails, `fetch` tries again and raises the error."""
        if self._process != os.getpid():
            self._start_threads()
        path = self._path(shard, start, stop)
        if path not in self._pending:
            self._pending.add(path)
            self._requests.put((path, shard, start, stop, verify))

    def __reduce__(self) -> tuple[type["RangeCache"], tuple[Path, int]]:
        return RangeCache, (self.folder, self.budget)

    def _start_threads(self) -> None:
        """Start threads and a new queue in each process: a fork copies no threads, and may copy a locked queue."""
        self._process, self._requests, self._pending = os.getpid(), SimpleQueue(), set()
        # The threads must not keep the cache alive: they end when nobody needs it any more.
        for _ in range(PREFETCH_THREADS):
            Thread(target=_serve, args=(weakref.ref(self), self._requests), daemon=True).start()
        weakref.finalize(self, _end_threads, self._requests)

    def _fetch_early(self, request: _Request) -> None:
        path, shard, start, stop, verify = request
        with suppress(Exception):  # `fetch` raises it again in the thread that needs the range
            os.close(self.fetch(shard, start, stop, verify))
        self._pending.discard(path)

    def _path(self, shard: Shard, start: int, stop: int) -> Path:
        identity = f"{shard.url}\0{shard.size}\0{shard.version}".encode("utf-8", "surrogateescape")
        return self.folder / hashlib.sha256(identity).hexdigest()[:20] / f"{start}-{stop}"

    def _download(self, path: Path, shard: Shard, start: int, stop: int, verify: Verify) -> int | None:
        """Download a range and return its descriptor; None if another process completed or removed it meanwhile."""
        descriptor = lock_part(path)
        if descriptor is None:
            return None
        part = part_of(path)
        try:
            self._space.write(descriptor, read_range(shard, start, stop, verify))
            part.rename(path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            unlock_and_close(descriptor)
            if isinstance(error, FileNotFoundError):  # the cache was emptied
                return None
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor


def _serve(cache: "weakref.ref[RangeCache]", requests: SimpleQueue[_Request | None]) -> None:
    while (request := requests.get()) is not None and (alive := cache()) is not None:
        alive._fetch_early(request)
        del alive


def _end_threads(requests: SimpleQueue[_Request | None]) -> None:
    for _ in range(PREFETCH_THREADS):
        requests.put(None)
