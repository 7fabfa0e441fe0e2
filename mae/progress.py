"""Progress bar on a terminal; elsewhere nothing is shown."""

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
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mae.output import is_quiet


class Advance(Protocol):
    """Function that moves a progress bar."""

    def __call__(self, amount: int, size: int = 0, /) -> None:
        """Count `amount` more as done; `size` is how many bytes they had, if the bar counts something else."""


@contextmanager
def progress_bar(title: str, total: int, is_bytes: bool = False) -> Iterator[Advance]:
    """Show how much of `total` is done, with the speed in bytes per second where sizes are known."""
    console = Console(file=sys.stderr)
    average_speed = TextColumn("{task.fields[speed]}")
    figures = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(), average_speed)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), *figures, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal or is_quiet()) as bar:
        task, began, read = bar.add_task(title, total=total, speed=""), time.monotonic(), 0

        def advance(amount: int, size: int = 0, /) -> None:
            nonlocal read
            read += size
            speed = f"{read / 1e6 / max(time.monotonic() - began, 1e-3):,.0f} MB/s" if read else ""
            bar.update(task, advance=amount, speed=speed)

        yield advance


def duration(seconds: float) -> str:
    """Format seconds: 75 as `1:15`, 3700 as `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
