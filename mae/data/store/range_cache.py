"""Remote shards near at hand: a cache of byte ranges that the processes of a node share.

A range lies in `folder/<hash of the object>/<start>-<stop>`. It appears there whole, by rename; until then it
is `<start>-<stop>.part`, locked by the process that downloads it. The lock dies with its holder, so after a
kill -9 the next one that needs the range takes the part over, or whoever makes room removes it.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

from mae.data.store.cache_space import CacheSpace
from mae.data.store.errors import RangesIgnoredError
from mae.data.store.range_files import claim, open_whole, part_of, unlock_and_close
from mae.data.store.storage import Shard, read_range
from mae.errors import UserError

Verify = Callable[[bytes], str | None]
"""Says what is wrong with the bytes of a range, or None."""

PREFETCH_THREADS = 4

_Wanted: TypeAlias = tuple[Path, Shard, int, int, Verify]


class RangeCache:
    """Byte ranges of remote shards as local files, at most `budget` bytes of them in `folder`.

    What was used longest ago makes room for what is new. Ranges that are being downloaded count, and may
    exceed the budget for as long as they are. Descriptors stay valid when their range is removed.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._space = CacheSpace(folder, budget)
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
                descriptor = open_whole(path, stop - start)
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
        descriptor = claim(path)
        if descriptor is None:
            return None
        part = part_of(path)
        try:
            self._space.write(descriptor, read_range(shard, start, stop, verify))
            part.rename(path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            unlock_and_close(descriptor)
            if isinstance(error, FileNotFoundError):  # someone has emptied the cache
                return None
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor
