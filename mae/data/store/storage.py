"""Objects of remote stores: find them, and read their bytes."""

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

# A request may take this long, plus the time that its bytes need at the slowest useful speed.
STALL_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 1 << 18
LISTING_SECONDS = 300.0

REQUESTS_AT_ONCE = 32
# Fewer names in one folder are looked up one by one: the folder may contain millions of objects.
MIN_NAMES_FOR_LISTING = 32

_VERSION_KEYS = ("ETag", "etag", "xet_hash", "blob_id", "LastModified", "mtime")


class Shard(NamedTuple):
    """Tar file as it was found: its place, and what changes when its content is replaced."""

    url: str
    """Path as the user gave it, or URL of a remote object; may hold secrets, so messages use `str(shard)`."""
    size: int
    """Size in bytes."""
    version: str
    """Modification time [ns] of a local file; ETag, or else modification time, or else "", of a remote object."""

    @staticmethod
    def of_file(path: Path) -> "Shard":
        """Describe the file at `path` as it is now."""
        found = path.stat()
        return Shard(str(path), found.st_size, str(found.st_mtime_ns))

    @property
    def is_remote(self) -> bool:
        """Whether the shard is in a remote store."""
        return is_remote(self.url)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return redacted(self.url).rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        return redacted(self.url)

    def __repr__(self) -> str:
        return f"Shard({redacted(self.url)!r}, {self.size}, {self.version!r})"


def find(urls: Sequence[str]) -> list[Shard | None]:
    """Look up the objects of `urls`; return them in the same order, None for each that does not exist.

    Many names in one folder cost one listing, if the store has listings; the others are looked up in parallel.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    known: dict[str, Shard | None] = {}
    for folder, names in folders.items():
        listed = _listed(folder) if len(names) >= MIN_NAMES_FOR_LISTING and not is_web(folder) else None
        if listed is not None:
            known |= {name: listed.get(name) for name in names}
    unknown = [url for url in urls if url not in known]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        known |= dict(zip(unknown, pool.map(_find_one, unknown), strict=True))
    return [known[url] for url in urls]


def is_folder(url: str) -> bool:
    """Return whether the store has a folder `url`."""
    entry = _entry(url)
    return entry is not None and entry["type"] == "directory"


def list_folder(url: str, suffixes: tuple[str, ...] = ("",)) -> list[Shard]:
    """Return the objects directly in a folder whose names end in one of `suffixes`, sorted by name."""
    return _files(url, "ls", suffixes)


def glob(url: str) -> list[Shard]:
    """Return the objects whose names match a pattern, sorted by name."""
    return _files(url, "glob")


def read_range(shard: Shard, start: int, stop: int, verify: Callable[[bytes], str | None] | None = None) -> bytes:
    """Return bytes start..stop of a remote shard; `verify` returns what is wrong with them, or None.

    Raises:
        UserError: if the object is missing, denied, replaced or damaged, or does not arrive in time.
        RangesIgnoredError: if the server ignores ranges.
    """

    def attempt() -> bytes:
        seconds = STALL_SECONDS + (stop - start) / SLOWEST_BYTES_PER_SECOND
        try:
            data: bytes = request(shard.url, "cat_file", start=start, end=stop, seconds=seconds)
        except OutOfRangeError:
            check_not_replaced(shard)
            raise
        wrong = f"got {len(data)} of {stop - start} bytes" if len(data) != stop - start else verify and verify(data)
        if wrong:
            check_not_replaced(shard)
            raise TransientError(f"bytes {start} to {stop} are damaged: {wrong}")
        return data

    return retried(shard.url, attempt)


def check_not_replaced(shard: Shard) -> None:
    """Compare `shard` with what the store has now.

    Raises:
        UserError: if they differ; the message describes both.
        TransientError: if the store does not answer.
    """
    connection.forget_listings(shard.url)
    now = _shard(shard.url, request(shard.url, "info", seconds=STALL_SECONDS))
    if now.size != shard.size or (now.version and shard.version and now.version != shard.version):
        raise UserError(
            f"{shard} was replaced while it was in use: {_identity(shard)} before, {_identity(now)} now; "
            "restore the old object, or start a new run with the new one"
        )


def _identity(shard: Shard) -> str:
    return f"{shard.size} bytes, version {shard.version or 'unknown'}"


def _listed(folder: str) -> dict[str, Shard] | None:
    """Return the objects of a folder by URL; None if listing is denied, which does not exclude reading."""
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
    """Return the files of a listing, sorted by name; look up one by one if the listing has no sizes."""
    try:
        found = retried(url, lambda: request(url, method, detail=True, seconds=LISTING_SECONDS))
    except MissingError:
        return []
    except DeniedError:
        if is_web(url):  # the usual answer of a server without listings
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
        raise UserError(f"the server does not report the size of {redacted(url)}; copy the shard to this machine")
    return Shard(url, int(entry["size"]), next((str(entry[key]) for key in _VERSION_KEYS if entry.get(key)), ""))
