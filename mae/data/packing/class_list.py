"""Class lists: `classes.txt` beside shards, or a file of the user; line N holds the name of label N - 1."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from mae.errors import UserError, first_of

CLASSES_FILE = "classes.txt"
# Class lists of earlier versions may hold any bytes; this round-trips them.
NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}
_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class ClassList:
    """Class names that are fixed before a source is listed."""

    names: tuple[str, ...] = ()
    origin: str = ""
    """File that holds them, for messages."""


NO_CLASSES = ClassList()


def known_classes(folder: Path) -> tuple[str, ...]:
    """Return the class list of a folder of shards; empty if there is none."""
    path = folder / CLASSES_FILE
    return read_classes(path) if path.exists() else ()


def read_classes(path: Path) -> tuple[str, ...]:
    """Read one class name per line.

    Raises:
        UserError: if the file cannot be read, or a line before the last name is empty or occurs twice.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is no file of at most {_MAX_BYTES} bytes with one class name per line")
        lines = path.read_text(**NAMES).removeprefix("\ufeff").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it must list one class name per line") from None
    if lines == [""]:
        return ()
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"line {number} of {path} is empty; allowed: one class name per line")
        if line in first:
            raise UserError(f"lines {first[line]} and {number} of {path} are both {line!r}; list each class once")
        first[line] = number
    return tuple(lines)


def fixed_classes(file: Path | None, out: Path) -> ClassList:
    """Return the classes of `file`, which must agree with those of the shards in `out`, or the latter alone.

    Raises:
        UserError: if the lists differ, or a name in `file` cannot be a line of classes.txt.
    """
    packed = ClassList(known_classes(out), str(out / CLASSES_FILE))
    if file is None:
        return packed
    wanted = ClassList(read_classes(file), str(file))
    if not wanted.names:
        raise UserError(f"{file} lists no class; allowed: one class name per line")
    for name in wanted.names:
        _require_writable(name, f"class {name!r} in {file}")
    if packed.names:
        require_equal(wanted, packed)
    return wanted


def require_equal(found: ClassList, known: ClassList) -> None:
    """Raise a `UserError` that names the first difference of two class lists, if there is one."""
    for label, (one, other) in enumerate(zip_longest(found.names, known.names)):
        if one != other:
            raise UserError(
                f"{found.origin} and {known.origin} list different classes: label {label} is "
                f"{_called(one)} in the first, {_called(other)} in the second; pack into another --out, or pack all "
                "splits again with one --classes FILE"
            )


def class_name(folder: str, root: str) -> str:
    """Return the class that a folder stands for, the same in every locale.

    Raises:
        UserError: if classes.txt cannot hold the name.
    """
    name = os.fsencode(folder).decode(**NAMES)
    _require_writable(name, f"class folder {name!r} in {root}")
    return name


def labels_of(folders: Sequence[str], root: str, known: ClassList) -> tuple[dict[str, int], list[str]]:
    """Return the label of each class folder of `root`, and the class names.

    Without a known list, the names are in alphabetical order.

    Raises:
        UserError: if a folder is not in the known list.
    """
    names = {folder: class_name(folder, root) for folder in folders}
    classes = list(known.names) or sorted(names.values())
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in names.values() if name not in number]
    if unknown:
        raise UserError(
            f"{root} has class folders that {known.origin} does not list: {quoted(unknown)} (it lists "
            f"{quoted(classes)}); remove them, or pack all splits into another --out with one --classes FILE of all "
            "classes"
        )
    return {folder: number[name] for folder, name in names.items()}, classes


def quoted(names: Iterable[str], most: int = 5) -> str:
    """Join the first names for a message of one line."""
    return first_of([name if name.isprintable() else repr(name) for name in names], most, ", ")


def _require_writable(name: str, what: str) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(
            f"{what} has control characters (such as a line break) or bytes that are not UTF-8, which {CLASSES_FILE} "
            "cannot hold; rename it"
        )


def _called(name: str | None) -> str:
    return "absent" if name is None else repr(name)
