"""List of shards: paths, globs, braces, folders and URLs expanded into tar files with sizes and versions."""

import fcntl
import glob
import gzip
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from braceexpand import braceexpand

from mae.data.store import storage
from mae.data.store.download import download
from mae.data.store.storage import Shard
from mae.data.store.urls import PACKAGES, is_remote, is_web, redacted, scheme_of
from mae.errors import UserError, first_of
from mae.files import sync

__all__ = ["SUFFIXES", "Shard", "default_cache_dir", "expand", "is_gzipped", "plain_tar"]

SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Endings of the names of shards."""

_COMPRESSED = (".gz", ".tgz")
_ALLOWED = f"a path, file://, {', '.join(f'{scheme}://' for scheme in PACKAGES)}"


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/mae`, or `~/.cache/mae`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"
    except RuntimeError:  # as in a container whose user has neither HOME nor a name
        raise UserError("this user has no home folder for the cache; set XDG_CACHE_HOME or cache_dir") from None


def expand(patterns: Sequence[str]) -> list[Shard]:
    """Expand braces, globs and folders in `patterns`; return the shards in the order given.

    A pattern is a path or a URL: s3://, gs://, http://, https://, hf:// or file://. A remote folder ends in a
    slash, or its store reports that it is a folder.

    Raises:
        UserError: if there is no pattern, a pattern matches nothing, a shard is missing, or a shard is listed twice;
            for a URL of another scheme, and for a shell command.
    """
    if not patterns:
        raise UserError("data.shards is empty; give one or more tar files, such as 'shards/train-*.tar'")
    found = [match for pattern in patterns for name in _names(pattern) for match in _matches(name)]
    known = _look_up([match for match in found if isinstance(match, str)])
    shards = [known[match] if isinstance(match, str) else match for match in found]
    missing = [redacted(str(match)) for match, shard in zip(found, shards, strict=True) if shard is None]
    if missing:
        raise UserError(f"{len(missing)} of {len(found)} shards do not exist: {first_of(missing, separator=', ')}")
    present = [shard for shard in shards if shard is not None]
    _refuse_repeats(present)
    return present


def is_gzipped(shard: Shard) -> bool:
    """Return whether a shard must be unpacked before it can be read at any position."""
    return shard.name.endswith(_COMPRESSED)


def plain_tar(shard: Shard, cache_dir: Path) -> Path:
    """Return a plain tar on this machine: the shard itself, or its copy in `cache_dir`, which is made if missing.

    Gzipped shards are unpacked, and remote shards are downloaded completely. A copy belongs to the place, size and
    version of its source. One process of a node makes it, and a rename completes it; the others wait for its lock.

    Raises:
        UserError: if the shard is damaged or cannot be read, or if the copy cannot be written.
    """
    if not shard.is_remote and not is_gzipped(shard):
        return Path(shard.url)
    place = shard.url if shard.is_remote else str(Path(shard.url).resolve())
    identity = f"{place}\0{shard.size}\0{shard.version}"
    folder = cache_dir / "shards" / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    target = folder / f"{shard.name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _copy(shard, target)
    except OSError as error:
        raise UserError(
            f"{'remote' if shard.is_remote else 'gzipped'} shard {shard} cannot be unpacked into {folder}: "
            f"{error.strerror or error}; unpack it yourself or set data.cache_dir"
        ) from None
    return target


def _copy(shard: Shard, target: Path) -> None:
    """Write the plain tar of a remote or gzipped shard; the caller holds the lock of its folder."""
    source, part = target.with_suffix(".source"), target.with_suffix(".part")
    try:
        if shard.is_remote:
            with source.open("wb") as file:
                download(shard, file)
        if is_gzipped(shard):
            _gunzip(source if shard.is_remote else Path(shard.url), part, str(shard))
        else:
            source.rename(part)
        sync(part)
        part.rename(target)
    finally:
        source.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def _gunzip(source: Path, target: Path, name: str) -> None:
    try:
        with gzip.open(source) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"shard {name} is a damaged gzip file: {error}; copy or pack it again") from None


def _names(pattern: str) -> list[str]:
    """Expand the braces of a pattern, and turn file:// URLs into paths."""
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"data.shards pattern {redacted(pattern)!r} cannot be expanded: {error}") from None
    return [_path_of(name) if _scheme(name) == "file" else name for name in names]


def _scheme(name: str) -> str:
    """Return the scheme of an allowed name, "" for a path.

    Raises:
        UserError: if the scheme is not allowed, or the name is a shell command.
    """
    special = re.match(r"-|\||pipe:|[A-Za-z][A-Za-z0-9+.-]*::", name)
    scheme = scheme_of(name)
    if special or scheme not in ("", "file", *PACKAGES):
        raise UserError(
            f"data.shards contains a name that begins with {special[0] if special else f'{scheme}://'!r}; "
            f"allowed: {_ALLOWED}; commands are never run; write ./name for a file with such a name"
        )
    return scheme


def _path_of(url: str) -> str:
    path = unquote(url.partition("://")[2].removeprefix("localhost"))
    if not path.startswith("/"):
        raise UserError(f"data.shards contains {url!r}, a file on another machine; write file:///folder/name.tar")
    return path


def _matches(name: str) -> list[str | Shard]:
    """Return the shards that match a name without braces; a plain name is returned without a look-up."""
    if is_remote(name):
        return _remote_matches(name)
    if Path(name).is_dir():
        found = sorted(str(p) for p in Path(name).iterdir() if p.name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"folder {name} contains no .tar, .tar.gz or .tgz file; see mae pack --help")
        return [*found]
    if glob.has_magic(name) and not Path(name).exists():
        found = sorted(str(Path(p)) for p in glob.glob(name, recursive=True))  # noqa: PTH207 (absolute patterns too)
        if not found:
            raise UserError(f"data.shards pattern {name!r} matches no file; check the path, and quote the pattern")
        return [*found]
    return [str(Path(name))]


def _remote_matches(url: str) -> list[str | Shard]:
    path = redacted(url)
    has_magic = any(sign in path for sign in ("*[" if is_web(url) else "*[?"))
    if has_magic:
        found = storage.glob(url)
    elif is_web(url) and path.endswith("/") and url != path:
        found = []  # a listing would drop the query, which may hold a signature
    elif path.endswith("/") or (not is_web(url) and not path.endswith(SUFFIXES) and storage.is_folder(url)):
        found = storage.list_folder(url, SUFFIXES)
    else:
        return [url]
    if not found:
        what = "matches no object" if has_magic else "contains no .tar, .tar.gz or .tgz object"
        why = " that its server lists; servers without listings need braces: train-{000000..000099}.tar"
        raise UserError(f"data.shards {path!r} {what}{why if is_web(url) else '; check the name'}")
    return [*found]


def _look_up(names: Sequence[str]) -> dict[str, Shard | None]:
    """Return the shard of each name, None for each that does not exist."""
    remote = [name for name in names if is_remote(name)]
    local = {name: Shard.of_file(Path(name)) if Path(name).is_file() else None for name in names if not is_remote(name)}
    return local | dict(zip(remote, storage.find(remote), strict=True))


def _refuse_repeats(shards: Sequence[Shard]) -> None:
    first: dict[str, Shard] = {}
    for shard in shards:
        real = shard.url if shard.is_remote else str(Path(shard.url).resolve())
        if real in first:
            raise UserError(f"shard {shard} is listed twice (also as {first[real]}); list each shard once")
        first[real] = shard
