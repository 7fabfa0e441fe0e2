"""Counts of what a shard holds but training does not use, by kind, each with the name of the first."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mae.errors import first_of

FOLDERS = "folders"
"""Kind of the folders of a tar: they hold nothing themselves, so nobody needs to be told of them at each start."""


class Counted(NamedTuple):
    """What was left out of one kind."""

    number: int
    first: str
    """Name of the first, with what is wrong with it where the kind does not say so."""


LeftOut = dict[str, Counted]
"""What was left out, by kind; a kind is a noun in the plural, such as `hidden files`."""
LeaveOut = Callable[[str, str], None]
"""Function that receives the kind and the name of each file that is left out."""


def leave_out(kind: str, name: str) -> None:
    """Do not count what is left out."""


def count_into(counts: LeftOut) -> LeaveOut:
    """Return a function that counts what is left out."""

    def count(kind: str, name: str) -> None:
        number, first = counts.get(kind, Counted(0, name))
        counts[kind] = Counted(number + 1, first)

    return count


def joined(parts: Iterable[tuple[str, LeftOut]]) -> LeftOut:
    """Add the counts of several shards, each given with its name."""
    counts: LeftOut = {}
    for shard, part in parts:
        for kind, (number, first) in part.items():
            before = counts.get(kind, Counted(0, f"{shard}: {first}"))
            counts[kind] = Counted(before.number + number, before.first)
    return counts


def described(counts: LeftOut) -> str:
    """Return the counts as text: `hidden files: 2 (the first: .a), folders: 1 (the first: b)`; empty for none."""
    return ", ".join(f"{kind}: {number:,} (the first: {first})" for kind, (number, first) in counts.items())


def describe_not_used(left_out: LeftOut, empty: Sequence[str], shards: int) -> list[str]:
    """Return in words what some shards hold but training does not use, and which of them have no images."""
    said = [f"left out of the shards: {described(left_out)}"] if left_out else []
    return said + ([f"{len(empty)} of {shards} shards have no images: {first_of(empty)}"] if empty else [])
