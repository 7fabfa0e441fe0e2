"""Live view of a run on a terminal: a bar, and below it the newest figures, as many in a line as fit."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mae.progress import duration

# Weight of the newest record in the smoothed loss.
_NEWEST = 0.5
_GAP = 3


class View:
    """What is shown; a figure that is not known yet is left out. Every method may be called from any thread."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self._title, self._done, self._total = title, done, total
        self._train: Mapping[str, Any] = {}
        self._loss: float | None = None
        self._ends = 0.0
        self._others: dict[str, str] = {}
        self._to_beat: Mapping[str, float] = {}
        self._checkpoint: tuple[int, float] | None = None
        self._widest: dict[str, int] = {}

    def step(self, done: int) -> None:
        """Move the bar."""
        self._done = done

    def report(self, record: Mapping[str, Any], seconds_left: float) -> None:
        """Show a record of kind `train`."""
        self._done, self._train, self._ends = record["step"], record, time.monotonic() + seconds_left
        if record["loss"] is not None:
            before = record["loss"] if self._loss is None else self._loss
            self._loss = before + _NEWEST * (record["loss"] - before)

    def record(self, record: Mapping[str, Any]) -> None:
        """Show what a record of another kind adds: baselines, or the accuracy of an evaluation."""
        if "patch_mean" in record and "place_mean" in record:
            self._to_beat = record
        for name, label in (("knn", "k-NN"), ("accuracy", "accuracy")):
            if record.get(name) is not None and "epoch" in record:
                self._others[label] = f"{label} {record[name]:.1%} at epoch {record['epoch']:.1f}"

    def checkpoint(self, step: int) -> None:
        """Show that the checkpoint of a step is on the disk."""
        self._checkpoint = step, time.monotonic()

    def cells(self) -> Iterator[tuple[str, str]]:
        """Yield name and text of each figure that is known."""
        train = self._train
        if train:
            yield "loss", "loss not finite" if self._loss is None or train["loss"] is None else f"loss {self._loss:.4f}"
        if self._to_beat:
            mean, of_place = self._to_beat["patch_mean"], self._to_beat["place_mean"]
            yield "baselines", f"to beat: the mean {mean:.3f}, the mean of each place {of_place:.3f}"
        if train:
            epochs = train["epoch"] * self._total / max(train["step"], 1)
            yield "epoch", f"epoch {train['epoch']:.1f} of {epochs:,.4g}"
            yield "lr", f"lr {train['lr']:.2e}"
            yield "speed", f"{train['images_per_second']:,.0f} images/s"
            yield "wait", f"data wait {train['data_wait']:.0%}"
            if "mfu" in train:
                yield "mfu", f"MFU {train['mfu']:.0%}"
            yield "memory", f"memory {train['peak_memory'] / 2**30:.2f} GiB"
        yield from self._others.items()
        if self._checkpoint is None:
            yield "checkpoint", "no checkpoint yet"
        else:
            step, written = self._checkpoint
            yield "checkpoint", f"checkpoint {step:,} written {duration(time.monotonic() - written)} ago"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        done, total = self._done, self._total
        left = f"  ETA {duration(max(self._ends - time.monotonic(), 0.0))}" if self._train else ""
        text = f"{done:,}/{total:,}  {done / max(total, 1):.0%}{left}"
        bar.add_row(Text(self._title, style="bold"), ProgressBar(total=max(total, 1), completed=done), Text(text))
        yield bar
        yield from self._lines(options.max_width)

    def _lines(self, width: int) -> Iterator[Text]:
        """Yield lines of cells. A cell keeps the width that it once had, so that nothing dances."""
        line = Text(no_wrap=True, overflow="ellipsis")
        for name, text in self.cells():
            wide = self._widest[name] = max(len(text), self._widest.get(name, 0))
            if line and len(line) + _GAP + len(text) > width:
                yield line
                line = Text(no_wrap=True, overflow="ellipsis")
            line.append(" " * _GAP if line else "").append(text.ljust(wide), style=self._style(name))
        yield line

    def _style(self, name: str) -> str:
        """Return the style of a cell: the loss is green once it is below what needs no learning."""
        if name != "loss":
            return ""
        is_learning = self._to_beat and self._loss is not None and self._loss < self._to_beat["place_mean"]
        return "bold green" if is_learning else "bold"
