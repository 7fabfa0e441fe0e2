"""Reading of files that anyone may have put there: only regular ones, and only up to a size."""

import json
from pathlib import Path
from typing import Any

from mae.files import read_bounded

_MAX_JSON_BYTES = 1 << 30
_MAX_COUNT = 1 << 62


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping from a regular file.

    Raises:
        OSError: if the file cannot be read, is no regular file, or is too large.
        ValueError: if it is not a JSON mapping, or is too deep.
    """
    try:
        value = json.loads(read_bounded(path, _MAX_JSON_BYTES).decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it must hold a JSON mapping")
    return value


def is_count(value: object) -> bool:
    """Return whether a value of a JSON file is a whole number from 0 to 2^62."""
    return type(value) is int and 0 <= value <= _MAX_COUNT


def require(is_right: bool, what: str, value: object) -> None:
    """Raise a `ValueError` that shows `value` if it is not right."""
    if not is_right:
        raise ValueError(f"{what} is {str(value)[:80]!r}")
