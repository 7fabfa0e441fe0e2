"""Plain tars on this machine: copies of gzipped and remote shards, which are made once."""

import gzip
import hashlib
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

from mae.data.store.download import download
from mae.data.store.errors import remedy_for
from mae.data.store.lock import lock
from mae.data.store.storage import Shard
from mae.errors import UserError
from mae.files import sync

CACHE_BYTES = 100e9
"""Greatest total size of the copies [bytes], unless the settings say otherwise."""
_COMPRESSED = (".gz", ".tgz")
_FOLDER = "shards"
# A tar of images hardly shrinks. A small file that unpacks to much more is a mistake or an attack on the disk.
_MAX_RATIO = 100
_ANY_RATIO_BYTES = 64 << 20
# Other programs, and the checkpoints of a run, need the rest.
_SHARE_OF_FREE_DISK = 0.9
_BLOCK_BYTES = 1 << 20
_BYTES_BETWEEN_CHECKS = 64 << 20


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/mae`, or `~/.cache/mae`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"
    except RuntimeError:  # as in a container whose user has neither HOME nor a name
        raise UserError("this user has no home folder for the cache; set XDG_CACHE_HOME or cache_dir") from None


def is_gzipped(shard: Shard) -> bool:
    """Return whether a shard must be unpacked before it can be read at any position."""
    return shard.name.endswith(_COMPRESSED)


def plain_tar(shard: Shard, cache_dir: Path, cache_bytes: float = CACHE_BYTES) -> Path:
    """Return a plain tar on this machine: the shard itself, or its copy in `cache_dir`, which is made if missing.

    Gzipped shards are unpacked, and remote shards are downloaded completely. A copy belongs to the place, size and
    version of its source. One process of a node makes it, and a rename completes it; the others wait for its lock.

    Raises:
        UserError: if the shard is damaged or cannot be read; if the copy cannot be written; or if a gzipped shard
            unpacks to more than 100 times its size and 64 MiB, fills its disk, or makes the copies of whole shards
            exceed `cache_bytes`.
    """
    if not shard.is_remote and not is_gzipped(shard):
        return Path(shard.url)
    place = shard.url if shard.is_remote else str(Path(shard.url).resolve())
    identity = f"{place}\0{shard.size}\0{shard.version}"
    folder = cache_dir / _FOLDER / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    target = folder / f"{shard.name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / "lock"):
            if not target.exists():
                _copy(shard, target, cache_bytes)
    except OSError as error:
        raise UserError(
            f"{'remote' if shard.is_remote else 'gzipped'} shard {shard} cannot be unpacked into {folder}: "
            f"{error.strerror or error}; {remedy_for(error, 'unpack it yourself or set data.cache_dir')}"
        ) from None
    return target


def unpacked_bytes(cache_dir: Path) -> int:
    """Return the size of all copies of whole shards in a cache, finished or not [bytes]."""
    total = 0
    for path in (cache_dir / _FOLDER).glob("*/*"):
        with suppress(FileNotFoundError):  # another process has just finished it
            total += path.stat().st_size
    return total


def _copy(shard: Shard, target: Path, cache_bytes: float) -> None:
    """Write the plain tar of a remote or gzipped shard; the caller holds the lock of its folder."""
    source, part = target.with_suffix(".source"), target.with_suffix(".part")
    try:
        if shard.is_remote:
            _require_room(shard, target, shard.size, cache_bytes)
            with source.open("wb") as file:
                download(shard, file)
        if is_gzipped(shard):
            _gunzip(source if shard.is_remote else Path(shard.url), part, shard, cache_bytes)
        else:
            source.rename(part)
        sync(part)
        part.rename(target)
    finally:
        source.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def _gunzip(source: Path, target: Path, shard: Shard, cache_bytes: float) -> None:
    most, written = max(_MAX_RATIO * shard.size, _ANY_RATIO_BYTES), 0
    try:
        with gzip.open(source) as packed, target.open("wb") as plain:
            while block := packed.read(_BLOCK_BYTES):
                if written % _BYTES_BETWEEN_CHECKS == 0:
                    _require_room(shard, target, len(block), cache_bytes)
                written += len(block)
                if written > most:
                    raise UserError(
                        f"gzipped shard {shard} has {shard.size:,} bytes but unpacks to more than {most:,} (allowed: "
                        f"{_MAX_RATIO} times its size, or 64 MiB); if right, unpack it yourself and name the .tar"
                    )
                plain.write(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"shard {shard} is a damaged gzip file: {error}; copy or pack it again") from None


def _require_room(shard: Shard, target: Path, more: int, cache_bytes: float) -> None:
    """Raise a `UserError` if `more` bytes in the folder of `target` exceed the cache's budget or nearly fill its disk.

    Several processes that unpack at once may exceed the budget by what they write between two checks.
    """
    folder = target.parent.parent
    copies, free = unpacked_bytes(folder.parent), shutil.disk_usage(folder).free
    if copies + more > cache_bytes:
        raise UserError(
            f"shard {shard} cannot be copied: {folder} holds {copies:,} bytes, allowed are {cache_bytes:,.0f} "
            "(data.cache_bytes); raise it, delete copies that are not used any more, or unpack the shards yourself"
        )
    if more > _SHARE_OF_FREE_DISK * free:
        raise UserError(
            f"shard {shard} cannot be copied: the disk of {folder} has {free:,} bytes free, of which at most "
            f"{_SHARE_OF_FREE_DISK:.0%} may be filled; set data.cache_dir to a larger disk"
        )
