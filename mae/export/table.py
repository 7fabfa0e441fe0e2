"""Parts of a text in Markdown, in which names from files change nothing but themselves."""

import re
from collections.abc import Iterable, Sequence

_SPECIAL = str.maketrans({"|": "&#124;", "<": "&lt;", ">": "&gt;", "`": "'", "[": "&#91;", "*": "&#42;"})
# Within a word, an underscore is only itself.
_UNDERSCORE = re.compile(r"(?<!\w)_|_(?!\w)")


def table(rows: Iterable[Sequence[str]], titles: Sequence[str] = ("", "")) -> str:
    """Return a table; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    head = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    return "\n".join([*head, *lines]) if lines else ""


def safe(text: object) -> str:
    """Return a text on one line, without what Markdown or HTML would take for more than text."""
    return _UNDERSCORE.sub("&#95;", " ".join(str(text).split()).translate(_SPECIAL))


def by(size: Sequence[int]) -> str:
    """Return `height x width`."""
    return "x".join(map(str, size))


def amounts(numbers: Iterable[float]) -> str:
    """Return numbers, as precise as anybody needs them."""
    return ", ".join(f"{number:.8g}" for number in numbers)
