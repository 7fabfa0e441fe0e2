"""Names of the same tensors in two libraries: one table, read in both directions."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

KeyMap = Mapping[str, str | tuple[str, ...]]
"""Names of this program and the names of the same tensors in another library.

`#` stands for the number of a block. A name that ends in `.` or `_` stands for its weight and its bias. Several names
are the parts of one tensor, one after the other along its first dimension.
"""


class Renamed(NamedTuple):
    """Tensors by the names of this program."""

    weights: dict[str, Tensor]
    names: dict[str, str]
    """New name of each tensor that was given, by its old name; tensors that the table does not know are left out."""


def renamed_from(weights: Mapping[str, Tensor], key_map: KeyMap) -> Renamed:
    """Rename the tensors of another library to the names of this program.

    A tensor that the other library keeps in parts is left out unless all its parts are there.
    """
    names: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for theirs in weights:
        ours = _translated(theirs, _their_names(key_map))
        if ours is None or ours in found:
            continue
        parts = parts_of(ours, key_map)
        if theirs not in parts or any(part not in weights for part in parts):
            continue
        found[ours] = torch.cat([weights[part] for part in parts]) if len(parts) > 1 else weights[theirs]
        names |= dict.fromkeys(parts, ours)
    return Renamed(found, names)


def renamed_to(weights: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Rename tensors of this program to the names of another library; those that it has no name for are left out."""
    found: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        parts = parts_of(ours, key_map)
        pieces = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
        found |= {part: piece.contiguous() for part, piece in zip(parts, pieces, strict=bool(parts))}
    return found


def without_place(names: Iterable[str], key_map: KeyMap) -> list[str]:
    """Return those of our names for which another library has none."""
    return [name for name in names if not parts_of(name, key_map)]


def parts_of(name: str, key_map: KeyMap) -> tuple[str, ...]:
    """Return the names in another library of one of our tensors; none if it has none."""
    for ours, theirs in key_map.items():
        if match := _pattern(ours).fullmatch(name):
            parts = (theirs,) if isinstance(theirs, str) else theirs
            return tuple(_filled(part, match) for part in parts)
    return ()


def _their_names(key_map: KeyMap) -> list[tuple[str, str]]:
    """Return each name of the other library with ours."""
    listed = [(ours, (theirs,) if isinstance(theirs, str) else theirs) for ours, theirs in key_map.items()]
    return [(part, ours) for ours, parts in listed for part in parts]


def _translated(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if match := _pattern(old).fullmatch(name):
            return _filled(new, match)
    return None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    kinds = "(?P<kind>weight|bias)" if name.endswith((".", "_")) else ""
    return re.compile(re.escape(name).replace(r"\#", "(?P<block>[0-9]+)") + kinds)


def _filled(name: str, match: re.Match[str]) -> str:
    groups = match.groupdict()
    return name.replace("#", groups.get("block", "")) + groups.get("kind", "")
