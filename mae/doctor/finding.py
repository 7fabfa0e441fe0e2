"""What a check has found, and what that means for the start."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Of one check, and so of whether to start."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "unknown"
    """Not examined, because something it rests on is a problem already."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, in one line."""

    found: str
    problems: tuple[str, ...] = ()
    """Why not to start: what is needed, and what to change."""
    warnings: tuple[str, ...] = ()
    """What is likely not meant so: what is needed, and what to change."""
    is_unknown: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst of it."""
        if self.problems:
            return Verdict.PROBLEM
        if self.warnings:
            return Verdict.WARNING
        return Verdict.UNKNOWN if self.is_unknown else Verdict.OK

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.found, *self.problems, *self.warnings)))


def counted(number: int, noun: str) -> str:
    """`1 worker`, `2 processes`, `3 batches`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def gigabytes(size: int | float) -> str:
    """`1500000000` -> `1.5 GB`, and `120000` -> `0.12 MB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
