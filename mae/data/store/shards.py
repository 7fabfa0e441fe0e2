"""List of shards: paths, globs, braces, folders and URLs expanded into tar files with sizes and versions."""

import glob
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from braceexpand import braceexpand

from mae.data.store import storage
from mae.data.store.storage import Shard
from mae.data.store.urls import PACKAGES, is_remote, is_web, redacted, scheme_of
from mae.errors import UserError, first_of

__all__ = ["SUFFIXES", "Shard", "expand"]

SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Endings of the names of shards."""

# More would take minutes and gigabytes before the first is looked for.
_MAX_SHARDS = 1_000_000
_ALLOWED = f"a path, file://, {', '.join(f'{scheme}://' for scheme in PACKAGES)}"


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
    try:
        found = [match for pattern in patterns for name in _names(pattern) for match in _matches(name)]
        known = _look_up([match for match in found if isinstance(match, str)])
    except OSError as error:
        raise UserError(f"data.shards cannot be found: {error.strerror}: {error.filename}; correct the path") from None
    shards = [known[match] if isinstance(match, str) else match for match in found]
    missing = [redacted(str(match)) for match, shard in zip(found, shards, strict=True) if shard is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} shards do not exist: {first_of(missing, separator=', ')}{_hint(missing)}"
        )
    present = [shard for shard in shards if shard is not None]
    _refuse_repeats(present)
    return present


def _names(pattern: str) -> list[str]:
    """Expand the braces and the `~` of a pattern, and turn file:// URLs into paths."""
    if re.match(r"[A-Za-z]:[\\/]|\\\\", pattern):
        raise UserError(f"data.shards pattern {pattern} is a path of Windows; write it as Linux sees it: /mnt/c/...")
    try:
        names = list(islice(_expanded(pattern), _MAX_SHARDS + 1))
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.shards pattern {redacted(pattern)!r} cannot be expanded: {error}") from None
    if len(names) > _MAX_SHARDS:
        raise UserError(f"data.shards pattern {redacted(pattern)!r} names more than {_MAX_SHARDS:,} shards; {_FEWER}")
    names = [_path_of(name) if _scheme(name) == "file" else name for name in names]
    return [_in_home(name) if name.startswith("~") else name for name in names]


_FEWER = "pack fewer and larger ones, or name them by a folder or a glob"


def _expanded(pattern: str) -> Iterator[str]:
    """Expand braces; refuse ranges that the library would list before it gives the first name."""
    ranges = re.findall(r"\{(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?[0-9]+)?\}", pattern)
    if sum(abs(int(last) - int(first)) for first, last in ranges) > _MAX_SHARDS:
        raise ValueError(f"a range has more than {_MAX_SHARDS:,} numbers; {_FEWER}")
    return iter(braceexpand(pattern))


def _in_home(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"data.shards contains {path}: {error}; write the whole path") from None


def _hint(missing: Sequence[str]) -> str:
    """Return what may be meant by names that do not exist."""
    folder = next((name for name in missing if Path(name).is_dir()), None)
    if folder is not None:
        return f"; {folder} is a folder: name the shards in it by {folder}/*.tar, or pack its images: {_pack(folder)}"
    if any("," in name for name in missing):
        return "; several shards are separated by blanks, not by commas"
    return ""


def _pack(folder: str) -> str:
    return f"mae pack {shlex.quote(folder)} --out SHARDS"


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
            raise UserError(
                f"folder {name} contains no .tar, .tar.gz or .tgz file; if it is a folder of images, pack them first: "
                f"{_pack(name)}"
            )
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
