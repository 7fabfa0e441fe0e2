"""Report of every tensor of a model to begin from: loaded, resampled, new, left out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from mae.errors import first_of

_MOST_NAMES = 6


@dataclass(frozen=True)
class KeyReport:
    """What became of each tensor."""

    format: str
    """Library or program whose file it is."""
    loaded: tuple[str, ...]
    """Names here of the tensors that were loaded, those that were resampled too."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why a tensor was not loaded, by its name in the file."""
    resampled: Mapping[str, str] = field(default_factory=dict)
    """How a tensor was made to fit, by its name here."""
    new: tuple[str, ...] = ()
    """Names here of tensors that begin anew."""
    remarks: tuple[str, ...] = ()
    """What was assumed, or is different here."""

    def __str__(self) -> str:
        """Return the report in one line."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resampled:
            changes = [f"{name} {how}" for name, how in self.resampled.items()]
            parts.append(f"{len(self.resampled)} of them resampled ({first_of(changes, _MOST_NAMES, ', ')})")
        if self.new:
            parts.append(f"{len(self.new)} new ({first_of(self.new, _MOST_NAMES, ', ')})")
        if self.left_out:
            reasons = Counter(self.left_out.values())
            why = [reason if len(reasons) == 1 else f"{count} {reason}" for reason, count in reasons.items()]
            parts.append(f"{len(self.left_out)} left out ({first_of(why, _MOST_NAMES, ', ')})")
        return "; ".join([f"({self.format}): {', '.join(parts)}", *self.remarks])

    def names(self) -> dict[str, object]:
        """Return all names, for a file."""
        return {
            "format": self.format,
            "loaded": list(self.loaded),
            "resampled": dict(self.resampled),
            "new": list(self.new),
            "left_out": dict(self.left_out),
            "remarks": list(self.remarks),
        }
