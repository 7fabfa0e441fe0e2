"""Finding of a check, and its verdict on the run."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Verdict of one check on the run."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "unknown"
    """Not examined, because another check has found a problem first."""


@dataclass(frozen=True)
class Finding:
    """Outcome of one check, in one line."""

    found: str
    problems: tuple[str, ...] = ()
    """Reasons not to start, each with a remedy."""
    warnings: tuple[str, ...] = ()
    """Probable mistakes that do not stop the run, each with a remedy."""
    is_unknown: bool = False

    @property
    def verdict(self) -> Verdict:
        """Worst verdict that applies."""
        if self.problems:
            return Verdict.PROBLEM
        if self.warnings:
            return Verdict.WARNING
        return Verdict.UNKNOWN if self.is_unknown else Verdict.OK

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.found, *self.problems, *self.warnings)))


def gigabytes(size: int | float) -> str:
    """Return a number of bytes as text: `1.5 GB` for 1500000000, `0.12 MB` for 120000."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
