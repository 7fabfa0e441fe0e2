"""Shards where they lie: what there is in a remote store, and its bytes."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mae.data.store import connection
from mae.data.store.connection import request, retried
from mae.data.store.errors import DeniedError, MissingError, OutOfRangeError, TransientError
from mae.data.store.urls import is_remote, is_web, redacted, scheme_of
from mae.errors import UserError

# A request may take this long, and longer by the time its bytes need on the slowest line that is of use.
STALL_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 1 << 18
LISTING_SECONDS = 300.0

REQUESTS_AT_ONCE = 32
# Fewer names of one folder are asked for one by one: the folder may hold millions.
LISTING_PAYS_FROM = 32

_VERSION_KEYS = ("ETag", "etag", "xet_hash", "blob_id", "LastModified", "mtime")


class Shard(NamedTuple):
    """One tar file as it was found: where it lies, and what changes when its content is replaced."""

    url: str
    """The path as the user named it, or the URL of a remote object; not fit for messages, `str` is."""
    size: int
    """Bytes."""
    version: str
    """Modification time [ns] of a local file; ETag, else time of modification, else "" of a remote object."""

    @staticmethod
    def of_file(path: Path) -> "Shard":
        """Describe the file at `path` as it is now."""
        found = path.stat()
        return Shard(str(path), found.st_size, str(found.st_mtime_ns))

    @property
    def is_remote(self) -> bool:
        """Whether the bytes come over a network."""
        return is_remote(self.url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return redacted(self.url).rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        return redacted(self.url)

    def __repr__(self) -> str:
        return f"Shard({redacted(self.url)!r}, {self.size}, {self.version!r})"


def find(urls: Sequence[str]) -> list[Shard | None]:
    """The objects of the given URLs in the order given, None for each that does not exist.

    Many names of one folder cost one listing where the store has listings; others are asked for in parallel.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    known: dict[str, Shard | None] = {}
    for folder, names in folders.items():
        listed = _listed(folder) if len(names) >= LISTING_PAYS_FROM and not is_web(folder) else None
        if listed is not None:
            known |= {name: listed.get(name) for name in names}
    unknown = [url for url in urls if url not in known]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        known |= dict(zip(unknown, pool.map(_find_one, unknown), strict=True))
    return [known[url] for url in urls]


def is_folder(url: str) -> bool:
    """Whether the store knows `url` as a folder; False where nothing has that name."""
    entry = _entry(url)
    return entry is not None and entry["type"] == "directory"


def list_folder(url: str, suffixes: tuple[str, ...] = ("",)) -> list[Shard]:
    """The objects directly in a folder that end in one of `suffixes`, by name; empty if there are none."""
    return _files(url, "ls", suffixes)


def glob(url: str) -> list[Shard]:
    """The objects whose names match, by name."""
    return _files(url, "glob")


def read_range(shard: Shard, start: int, stop: int, verify: Callable[[bytes], str | None] | None = None) -> bytes:
    """Bytes start..stop of a remote shard; `verify` says what is wrong with them, or None.

    Raises:
        UserError: if the object is missing, denied, replaced, damaged or cannot be reached in time.
        RangesIgnoredError: if the server has no ranges.
    """

    def attempt() -> bytes:
        seconds = STALL_SECONDS + (stop - start) / SLOWEST_BYTES_PER_SECOND
        try:
            data: bytes = request(shard.url, "cat_file", start=start, end=stop, seconds=seconds)
        except OutOfRangeError:
            check_not_replaced(shard)
            raise
        wrong = f"{len(data)} of {stop - start} bytes came" if len(data) != stop - start else verify and verify(data)
        if wrong:
            check_not_replaced(shard)
            raise TransientError(f"bytes {start} to {stop} are damaged: {wrong}")
        return data

    return retried(shard.url, attempt)


def check_not_replaced(shard: Shard) -> None:
    """Ask the store again what it holds.

    Raises:
        UserError: naming both, if it is not what `shard` was.
        TransientError: if the store does not answer.
    """
    connection.forget_listings(shard.url)
    now = _shard(shard.url, request(shard.url, "info", seconds=STALL_SECONDS))
    if now.size != shard.size or (now.version and shard.version and now.version != shard.version):
        raise UserError(
            f"{shard} was replaced while it was in use: {_identity(shard)} before, {_identity(now)} now; "
            "put the old one back, or begin a new run with the new one"
        )


def _identity(shard: Shard) -> str:
    return f"{shard.size} bytes, version {shard.version or 'unknown'}"


def _listed(folder: str) -> dict[str, Shard] | None:
    """The objects of a folder by URL; None if they may not be listed, though each may well be read."""
    try:
        return {shard.url: shard for shard in list_folder(folder)}
    except DeniedError:
        return None


def _find_one(url: str) -> Shard | None:
    entry = _entry(url)
    return None if entry is None or entry["type"] == "directory" else _shard(url, entry)


def _entry(url: str) -> dict[str, Any] | None:
    try:
        return retried(url, lambda: dict(request(url, "info", seconds=STALL_SECONDS)))
    except MissingError:
        return None


def _files(url: str, method: str, suffixes: tuple[str, ...] = ("",)) -> list[Shard]:
    """The files of a listing, by name; sizes that it lacks are asked for one by one."""
    try:
        found = retried(url, lambda: request(url, method, detail=True, seconds=LISTING_SECONDS))
    except MissingError:
        return []
    except DeniedError:
        if is_web(url):  # the usual answer of a server that lists nothing
            return []
        raise
    named: dict[str, dict[str, Any]] = {}
    for entry in found.values() if isinstance(found, dict) else found:
        name = entry["name"] if scheme_of(entry["name"]) else f"{scheme_of(url)}://{entry['name']}"
        if entry["type"] == "file" and name.endswith(suffixes):
            named[name] = entry
    if any(entry["size"] is None for entry in named.values()):
        return [shard for shard in find(sorted(named)) if shard is not None]
    return [_shard(name, named[name]) for name in sorted(named)]


def _shard(url: str, entry: dict[str, Any]) -> Shard:
    if entry["size"] is None:
        raise UserError(f"the server does not tell the size of {redacted(url)}; copy the shard to this machine")
    return Shard(url, int(entry["size"]), next((str(entry[key]) for key in _VERSION_KEYS if entry.get(key)), ""))
