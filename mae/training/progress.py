"""Progress for a person, on rank 0 only: a live view on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live

from mae.output import is_quiet, is_said, one_line
from mae.progress import duration
from mae.training.view import View

_REFRESHES_PER_SECOND = 2


class TrainingProgress:
    """Display of the step, the newest figures and the remaining time."""

    def __init__(self, title: str, enabled: bool) -> None:
        self._title, self._enabled = title, enabled
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._view: View | None = None
        self._total = 0

    @contextmanager
    def running(self, done: int, total: int, records: Iterable[Mapping[str, Any]] = ()) -> Iterator[None]:
        """Show the progress from `done` to `total` steps while the context lasts; `records` were logged before."""
        self._total = total
        if not (self._enabled and self._console.is_terminal) or self._console.is_dumb_terminal or is_quiet():
            yield
            return
        self._view = View(self._title, done, total)
        for record in records:
            self._view.record(record)
        with Live(self._view, console=self._console, refresh_per_second=_REFRESHES_PER_SECOND):
            yield
        self._view = None

    def step(self, done: int) -> None:
        """Move the bar."""
        if self._view is not None:
            self._view.step(done)

    def report(self, record: Mapping[str, Any], seconds_left: float) -> None:
        """Show a record of kind `train`, and the time that is left."""
        if self._view is not None:
            self._view.report(record, seconds_left)
        else:
            self.say(f"{self._title} {record['step']}/{self._total} {describe(record)}  ETA {duration(seconds_left)}")

    def record(self, record: Mapping[str, Any]) -> None:
        """Keep what a record of another kind adds in sight."""
        if self._view is not None:
            self._view.record(record)

    def checkpoint(self, step: int) -> None:
        """Show that the checkpoint of a step is on the disk."""
        if self._view is not None:
            self._view.checkpoint(step)

    def say(self, text: str, is_result: bool = False) -> None:
        """Print one line of plain text; a quiet command prints warnings and its result only."""
        if self._enabled and is_said(text, is_result):
            self._console.print(one_line(text), markup=False)


def describe(record: Mapping[str, Any]) -> str:
    """Return the figures of a record of kind `train` in one line of at most 80 columns."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    mfu = f"  MFU {record['mfu']:.0%}" if "mfu" in record else ""
    return (
        f"epoch {record['epoch']:.1f}  loss {loss}  lr {record['lr']:.2e}  "
        f"{record['images_per_second']:,.0f} images/s  data wait {record['data_wait']:.0%}{mfu}"
    )
