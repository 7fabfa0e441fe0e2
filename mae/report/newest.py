"""Newest figures of a run, averaged because single lines of the log are noisy."""

import statistics
from collections.abc import Sequence
from typing import Any

from mae.report.reading import RunFiles

LINES = 5
"""Lines of the log over which the newest figures are averaged."""


def newest_loss(run: RunFiles) -> float | None:
    """Return the training loss, averaged over the newest lines of the log; None if none is finite."""
    losses = [record["loss"] for record in run.train[-LINES:] if record["loss"] is not None]
    return statistics.mean(losses) if losses else None


def data_wait(run: RunFiles) -> float | None:
    """Return the median share of time that the newest start waited for data; None without a log."""
    waits = [record["data_wait"] for record in newest_start(run.train)]
    return statistics.median(waits) if waits else None


def newest_start(train: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the newest start: the seconds of a line count from the start of its own."""
    first = next((at for at in range(len(train) - 1, 0, -1) if train[at]["seconds"] < train[at - 1]["seconds"]), 0)
    return list(train[first:])


def is_warming_up(run: RunFiles) -> bool:
    """Return whether the learning rate still rises."""
    warm_up = run.number("optim.warmup_epochs")
    return bool(run.train) and warm_up is not None and run.train[-1]["epoch"] < warm_up
