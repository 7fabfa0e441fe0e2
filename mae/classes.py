"""Class lists: the names of classes by label, compared wherever two of them meet."""

from collections.abc import Sequence
from itertools import zip_longest

from mae.errors import UserError


def require_same_classes(first: Sequence[str], where: str, second: Sequence[str], elsewhere: str) -> None:
    """Raise a `UserError` that names the first label whose class differs between the lists of two places.

    With different lists one label means two classes.
    """
    pairs = zip_longest(first, second)
    found = next(((label, *pair) for label, pair in enumerate(pairs) if pair[0] != pair[1]), None)
    if found is None:
        return
    label, one, other = found
    raise UserError(
        f"{where} and {elsewhere} have different class lists, of {len(first)} and {len(second)} classes: label {label} "
        f"is {_quoted(one)} in the first and {_quoted(other)} in the second; pack both with one list: "
        "mae pack ... --classes FILE, or into the same --out"
    )


def _quoted(name: str | None) -> str:
    return "no class" if name is None else repr(name)
