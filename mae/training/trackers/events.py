"""What a run gives to trackers: the figures of each record of its log, and its pictures."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae.training.run_folder.folder import RunFolder

_PICTURE = re.compile(r"step-(\d+)\.png")
PICTURES = "pictures"
"""Kind of an event that is a picture, and its name in a tracker."""


@dataclass(frozen=True)
class Event:
    """Record or picture of a step. A run has at most one of each kind at a step."""

    step: int
    kind: str
    numbers: Mapping[str, float]
    """Figures by the names that they have in a tracker, such as `train/loss`."""
    picture: Path | None = None

    def without(self, held: set[tuple[str, int]]) -> "Event | None":
        """Return what a tracker lacks that holds these names at these steps; None if it lacks nothing."""
        numbers = {name: value for name, value in self.numbers.items() if (name, self.step) not in held}
        picture = None if (PICTURES, self.step) in held else self.picture
        return Event(self.step, self.kind, numbers, picture) if numbers or picture else None


def events_of(folder: RunFolder, last: int) -> list[Event]:
    """Return the events of a run up to step `last`, in order of their steps.

    A record that is there twice, because a run was killed before it went on from that step, is taken once.
    """
    found: dict[tuple[int, str], Event] = {}
    for record in folder.metrics():
        kind, step = record.get("kind", ""), record["step"]
        numbers = dict(_numbers(kind, {name: value for name, value in record.items() if name != "step"}))
        if kind and numbers and step <= last:
            found[step, kind] = Event(step, kind, numbers)
    for path in folder.pictures.glob("step-*.png"):
        match = _PICTURE.fullmatch(path.name)
        if match and (step := int(match[1])) <= last:
            found[step, PICTURES] = Event(step, PICTURES, {}, path)
    return sorted(found.values(), key=lambda event: event.step)


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record with their full names; a loss that is not finite is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}/{name}", float(value)
