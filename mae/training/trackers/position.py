"""Position up to which each tracker of a run was given its events; it is kept in the run folder."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mae.errors import UserError
from mae.files import read_bounded, write_atomically
from mae.training.checkpoints.manifest import MALFORMED, require_types
from mae.training.trackers.events import Event

TRACKERS_FILE = "trackers.json"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Position:
    """What a tracker was given so far."""

    project: str
    run: str
    """Name or id by which the tracker knows the run; empty until the tracker has chosen it."""
    has_settings: bool = False
    """Whether the tracker was given the settings of the run."""
    step: int = 0
    """Step of the last event."""
    kinds: tuple[str, ...] = ()
    """Kinds of the events of that step."""
    in_doubt: bool = True
    """Whether the tracker may hold later events, because it is not known how far the last attempt came."""

    def lacks(self, event: Event) -> bool:
        """Return whether an event is still to be given to the tracker."""
        return event.step > self.step or (event.step == self.step and event.kind not in self.kinds)

    def after(self, events: list[Event]) -> "Position":
        """Return the position once the tracker has `events`, which it lacked, in order of their steps."""
        step = events[-1].step if events else self.step
        before = set(self.kinds) if step == self.step else set()
        kinds = before | {event.kind for event in events if event.step == step}
        return replace(self, step=step, kinds=tuple(sorted(kinds)), in_doubt=False)


def read_positions(folder: Path) -> dict[str, Position]:
    """Return the positions by tracker; empty if there are none yet.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / TRACKERS_FILE
    if not os.path.lexists(path):
        return {}
    try:
        found = json.loads(read_bounded(path, _MOST_BYTES))
        for each in found.values():
            require_types(each, project=str, run=str, step=int, has_settings=bool, kinds=list, in_doubt=bool)
        return {name: Position(**(each | {"kinds": tuple(map(str, each["kinds"]))})) for name, each in found.items()}
    except (OSError, ValueError, *MALFORMED) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}; restore or remove it") from None


def write_positions(folder: Path, positions: Mapping[str, Position]) -> None:
    """Write the positions; they survive a power cut."""
    text = json.dumps({name: asdict(position) for name, position in positions.items()}, indent=2)
    write_atomically(folder / TRACKERS_FILE, text.encode())
