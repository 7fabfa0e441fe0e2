"""Values in the JSON files of model folders, which may hold anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae.errors import UserError
from mae.files import read_bounded

_MOST_BYTES = 1 << 24
_LARGEST = 1 << 20


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None if there is no file.

    Raises:
        UserError: if it cannot be read, or holds no mapping.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(read_bounded(path, _MOST_BYTES))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a config is a mapping")
    return content


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def size_pair(value: object) -> tuple[int, int] | None:
    """Return height and width, of which a config may give one number; None for anything else."""
    values = value if isinstance(value, list) else [value, value]
    height, width = map(whole, values) if len(values) == 2 else (None, None)
    return None if height is None or width is None else (height, width)


def whole(value: object) -> int | None:
    """Return a number of things, at least 1; None for anything else."""
    return value if type(value) is int and 1 <= value <= _LARGEST else None


def number(value: object) -> float | None:
    """Return a number; None for anything else."""
    return float(value) if type(value) in (int, float) and abs(value) < _LARGEST else None  # type: ignore[arg-type]


def numbers(value: object) -> tuple[float, ...] | None:
    """Return a list of numbers; None for anything else."""
    found = tuple(number(each) for each in value) if isinstance(value, list) else ()
    return None if not found or None in found else found  # type: ignore[return-value]


def names_by_label(value: object) -> tuple[str, ...] | None:
    """Return names of classes from a list, or from a mapping of labels to names; None for anything else."""
    if isinstance(value, dict):
        if set(value) != set(map(str, range(len(value)))):
            return None
        value = [value[str(label)] for label in range(len(value))]
    is_named = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    return tuple(value) if is_named else None  # type: ignore[arg-type]
