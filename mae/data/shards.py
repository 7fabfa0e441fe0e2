"""Names of shards: paths, globs, braces and folders become a list of plain tar files."""

import fcntl
import glob
import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from mae.errors import UserError, first_of


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mae`, or `~/.cache/mae`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"


def expand(patterns: Sequence[str]) -> list[Path]:
    """The shards that `patterns` name, in the order given; braces, globs and folders are expanded.

    Raises:
        UserError: if nothing is named, a pattern matches nothing, a shard is missing, or one is named twice.
    """
    if not patterns:
        raise UserError("data.shards is empty; give one or more tar files, such as 'shards/train-*.tar'")
    paths = [path for pattern in patterns for path in _expand_one(pattern)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} shards do not exist: {first_of(missing, separator=', ')}")
    first_name: dict[Path, Path] = {}
    for path in paths:
        real = path.resolve()
        if real in first_name:
            raise UserError(f"shard {path} is listed twice (also as {first_name[real]}); list each shard once")
        first_name[real] = path
    return paths


def plain_tar(path: Path, cache_dir: Path) -> Path:
    """`path` itself, or for a gzipped shard its unpacked copy in `cache_dir`, made when it is not there.

    A copy belongs to the path, size and modification time of its source. It appears by rename, and a lock
    that dies with its holder lets one process of a node unpack while the others wait.
    """
    if path.suffix not in (".gz", ".tgz"):
        return path
    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    folder = cache_dir / "shards" / hashlib.sha256(identity.encode()).hexdigest()[:20]
    target = folder / f"{path.name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _gunzip(path, target)
    except OSError as error:
        raise UserError(
            f"gzipped shard {path} cannot be unpacked into {folder}: {error}; unpack it yourself or set data.cache_dir"
        ) from None
    return target


def _gunzip(source: Path, target: Path) -> None:
    part = target.with_suffix(".part")
    try:
        with gzip.open(source) as packed, part.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
            plain.flush()
            os.fsync(plain.fileno())
        part.rename(target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"shard {source} is a damaged gzip file: {error}; copy or pack it again") from None
    finally:
        part.unlink(missing_ok=True)


def _expand_one(pattern: str) -> list[Path]:
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"data.shards pattern {pattern!r} cannot be expanded: {error}") from None
    return [path for name in names for path in _matches(name)]


def _matches(name: str) -> list[Path]:
    if Path(name).is_dir():
        found = sorted(p for p in Path(name).iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz")))
        if not found:
            raise UserError(f"folder {name} holds no .tar, .tar.gz or .tgz file; see mae pack --help")
        return found
    if glob.has_magic(name) and not Path(name).exists():
        found = sorted(Path(p) for p in glob.glob(name, recursive=True))  # noqa: PTH207 (absolute patterns too)
        if not found:
            raise UserError(f"data.shards pattern {name!r} matches no file; check the path, and quote the pattern")
        return found
    return [Path(name)]
