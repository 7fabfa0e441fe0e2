"""Progress bar on a terminal, of rank 0 only; elsewhere nothing is shown."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mae.errors import is_rank_zero
from mae.output import is_quiet


class Advance(Protocol):
    """Function that moves a progress bar."""

    def __call__(self, amount: int, size: int = 0, /) -> None:
        """Count `amount` more as done; `size` is how many bytes they had, if the bar counts something else."""


@contextmanager
def progress_bar(title: str, total: int, is_bytes: bool = False) -> Iterator[Advance]:
    """Show how much of `total` is done, with the speed in bytes per second where sizes are known."""
    average_speed = TextColumn("{task.fields[speed]}")
    figures = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(), average_speed)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), *figures, TimeRemainingColumn())
    with _shown(*columns) as bar:
        task, began, read = bar.add_task(title, total=total, speed=""), time.monotonic(), 0

        def advance(amount: int, size: int = 0, /) -> None:
            nonlocal read
            read += size
            speed = f"{read / 1e6 / max(time.monotonic() - began, 1e-3):,.0f} MB/s" if read else ""
            bar.update(task, advance=amount, speed=speed)

        yield advance


@contextmanager
def working(title: str) -> Iterator[None]:
    """Show that a work goes on, and for how long, whose end cannot be foreseen."""
    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    with _shown(*columns, is_transient=True) as bar:
        bar.add_task(title, total=None)
        yield


def _shown(*columns: ProgressColumn, is_transient: bool = False) -> Progress:
    console = Console(file=sys.stderr)
    return Progress(
        *columns,
        console=console,
        transient=is_transient,
        # Lines go above the bar, but not away from a file that gets the standard output.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        disable=not console.is_terminal or is_quiet() or not is_rank_zero(),
    )


def duration(seconds: float) -> str:
    """Format seconds: 75 as `1:15`, 3700 as `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
