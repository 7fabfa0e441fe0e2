"""Class lists: `classes.txt` beside shards, or a file of the user; line N holds the name of label N - 1."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mae.classes import first_difference
from mae.data.classes import CLASSES_FILE, NAMES, read_class_list
from mae.errors import UserError, first_of


@dataclass(frozen=True)
class ClassList:
    """Class names that are fixed before a source is listed."""

    names: tuple[str, ...] = ()
    origin: str = ""
    """File that holds them, for messages."""


NO_CLASSES = ClassList()


def known_classes(folder: Path) -> tuple[str, ...]:
    """Return the class list of a folder of shards; empty if there is none."""
    return read_class_list(folder / CLASSES_FILE)


def read_classes(path: Path) -> tuple[str, ...]:
    """Read a user's class list; raises the errors of `read_class_list`, also if there is no file or no name in it."""
    names = read_class_list(path)
    if not names:
        raise UserError(f"{path} lists no class, or does not exist; allowed: a file with one class name per line")
    return names


def fixed_classes(file: Path | None, out: Path) -> ClassList:
    """Return the classes of `file`, which must agree with those of the shards in `out`, or the latter alone.

    Raises:
        UserError: if the lists differ, or a name in `file` cannot be a line of classes.txt.
    """
    packed = ClassList(known_classes(out), str(out / CLASSES_FILE))
    if file is None:
        return packed
    wanted = ClassList(read_classes(file), str(file))
    for name in wanted.names:
        require_writable(name, f"class {name!r} in {file}")
    if packed.names:
        require_equal(wanted, packed)
    return wanted


def require_equal(found: ClassList, known: ClassList) -> None:
    """Raise a `UserError` that names the first difference of two class lists, if there is one."""
    difference = first_difference(found.names, known.names)
    if difference is not None:
        label, one, other = difference
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
    require_writable(name, f"class folder {name!r} in {root}")
    return name


def labels_of(folders: Sequence[str], root: str, known: ClassList) -> tuple[dict[str, int], list[str]]:
    """Return the label of each class folder of `root`, and the class names.

    Without a known list, the names are in alphabetical order.

    Raises:
        UserError: if a folder is not in the known list.
    """
    names = {folder: class_name(folder, root) for folder in folders}
    number = number_classes(names.values(), f"{root} has class folders", known)
    return {folder: number[name] for folder, name in names.items()}, list(number)


def number_classes(names: Iterable[str], which: str, known: ClassList) -> dict[str, int]:
    """Return the label of each class, in the order of labels: that of the known list, else the alphabet.

    Raises:
        UserError: if a class is not in the known list; the message begins with `which`.
    """
    different = dict.fromkeys(names)
    number = {name: label for label, name in enumerate(known.names or sorted(different))}
    if unknown := [name for name in different if name not in number]:
        raise UserError(
            f"{which} that {known.origin} does not list: {quoted(unknown)} (it lists {quoted(number)}); remove them, "
            "or pack all splits into another --out with one --classes FILE of all classes"
        )
    return number


def quoted(names: Iterable[str], most: int = 5) -> str:
    """Join the first names for a message of one line."""
    return first_of([name if name.isprintable() else repr(name) for name in names], most, ", ")


def require_writable(name: str, what: str) -> None:
    """Raise a `UserError`, which begins with `what`, if classes.txt cannot hold the name."""
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(
            f"{what} has control characters (such as a line break) or bytes that are not UTF-8, which {CLASSES_FILE} "
            "cannot hold; rename it"
        )


def _called(name: str | None) -> str:
    return "absent" if name is None else repr(name)
