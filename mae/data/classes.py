"""Class names of shards: the file `classes.txt` beside them, with one name per line in the order of the labels."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mae.classes import require_same_classes
from mae.data.store import storage
from mae.data.store.errors import DeniedError
from mae.data.store.shards import Shard
from mae.data.store.urls import is_remote, is_web, redacted
from mae.errors import UserError
from mae.files import read_bounded

CLASSES_FILE = "classes.txt"
NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}
"""Encoding of class names, which may come from file names of any bytes."""
_MAX_BYTES = 16 << 20


def class_names(shards: Sequence[Shard], say: Callable[[str], None]) -> tuple[str, ...] | None:
    """Return the names by label of the classes of some shards; None if there is no `classes.txt` beside them.

    If only some of their folders have one, report the others with `say`: their labels are taken by number.

    Raises:
        UserError: if the lists of two folders differ, or a list cannot be read or names a class twice.
    """
    places = list(dict.fromkeys(_list_beside(shard) for shard in shards))
    lists = {place: _read(place) for place in places}
    named = [(place, names) for place, names in lists.items() if names]
    if not named:
        return None
    (first, expected), *others = named
    for place, names in others:
        require_same_classes(expected, redacted(first), names, redacted(place))
    for place in [place for place, names in lists.items() if not names]:
        say(f"{redacted(place)} does not exist: the labels of its shards are taken by number, as in {redacted(first)}")
    return expected


def read_class_list(path: Path) -> tuple[str, ...]:
    """Return the names in a class list; empty if there is no file.

    Raises:
        UserError: if it cannot be read, is larger than 16 MiB or no regular file, or a line is empty or occurs twice.
    """
    try:
        return _parse(read_bounded(path, _MAX_BYTES), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise UserError(
            f"class list {path} cannot be read: {error.strerror}; it needs one class name per line"
        ) from None
    except ValueError as error:
        raise UserError(f"class list {error}; it needs one class name per line") from None


def _list_beside(shard: Shard) -> str:
    url = shard.url.partition("?")[0] if is_web(shard.url) else shard.url  # a signature is for one object only
    folder, slash, _ = url.rpartition("/")
    return f"{folder}{slash}{CLASSES_FILE}"


def _read(place: str) -> tuple[str, ...]:
    if not is_remote(place):
        return read_class_list(Path(place))
    try:
        (found,) = storage.find([place])
    except DeniedError:  # some stores answer so for an object that does not exist
        return ()
    if found is None:
        return ()
    if found.size > _MAX_BYTES:
        raise UserError(f"class list {found} has {found.size:,} bytes; allowed: 16 MiB")
    return _parse(storage.read_range(found, 0, found.size), str(found)) if found.size else ()


def _parse(text: bytes, place: str) -> tuple[str, ...]:
    lines = text.decode(**NAMES).removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n").split("\n")
    first: dict[str, int] = {}
    for number, line in enumerate(lines if lines != [""] else [], 1):
        if not line:
            raise UserError(f"line {number} of {place} is empty; allowed: one class name per line")
        if line in first:
            raise UserError(f"lines {first[line]} and {number} of {place} are both {line!r}; list each class once")
        first[line] = number
    return tuple(first)
