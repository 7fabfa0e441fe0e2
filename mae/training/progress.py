"""Progress for a person, on rank 0 only: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from mae.output import one_line


class _Bar(Progress):
    """Bar, and the newest figures in a line below it: together they would not fit into 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")


class TrainingProgress:
    """Display of the step, the loss, the speed and the remaining time."""

    def __init__(self, title: str, enabled: bool) -> None:
        self._title, self._enabled = title, enabled
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._total = 0

    @contextmanager
    def running(self, done: int, total: int) -> Iterator[None]:
        """Show a bar from `done` to `total` steps while the context lasts."""
        self._total = total
        if not (self._enabled and self._console.is_terminal):
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} {task.fields[left]}"),
            TimeElapsedColumn(),
        )
        with _Bar(*columns, console=self._console) as self._bar:
            self._task = self._bar.add_task(self._title, total=total, completed=done, left="")
            yield
        self._bar = None

    def step(self, done: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report(self, record: Mapping[str, Any], seconds_left: float) -> None:
        """Show a record of kind `train`, and the time that is left."""
        done, text, left = record["step"], describe(record), f"ETA {duration(seconds_left)}"
        if self._bar is not None:
            self._bar.figures = text
            self._bar.update(self._task, completed=done, left=left)
        else:
            self.say(f"{self._title} {done}/{self._total} {text}  {left}")

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        if self._enabled:
            self._console.print(one_line(text), markup=False)


def describe(record: Mapping[str, Any]) -> str:
    """Return the figures of a record of kind `train` in one line of at most 80 columns."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    mfu = f"  MFU {record['mfu']:.0%}" if "mfu" in record else ""
    return (
        f"epoch {record['epoch']:.1f}  loss {loss}  lr {record['lr']:.2e}  "
        f"{record['images_per_second']:,.0f} images/s  data wait {record['data_wait']:.0%}{mfu}"
    )


def duration(seconds: float) -> str:
    """Format seconds: 75 as `1:15`, 3700 as `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
