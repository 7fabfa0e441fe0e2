"""Class lists: the names of classes by label, compared wherever two of them meet."""

from collections.abc import Sequence
from itertools import zip_longest

from mae.errors import UserError


def require_same_classes(first: Sequence[str], where: str, second: Sequence[str], elsewhere: str) -> None:
    """Raise a `UserError` that names the first label whose class differs between the lists of two places.

    With different lists one label means two classes.
    """
    found = first_difference(first, second)
    if found is None:
        return
    label, one, other = found
    raise UserError(
        f"{where} and {elsewhere} have different class lists, of {len(first)} and {len(second)} classes: label {label} "
        f"is {_quoted(one)} in the first and {_quoted(other)} in the second; pack both with one list: "
        "mae pack ... --classes FILE, or into the same --out"
    )


def first_difference(first: Sequence[str], second: Sequence[str]) -> tuple[int, str | None, str | None] | None:
    """Return the first label whose class differs between two lists, and both names; None for a label beyond a list."""
    pairs = enumerate(zip_longest(first, second))
    return next(((label, one, other) for label, (one, other) in pairs if one != other), None)


def _quoted(name: str | None) -> str:
    return "no class" if name is None else repr(name)
