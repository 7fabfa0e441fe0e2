"""Results of an evaluation: one row per encoder and protocol, with all that is needed to repeat its figures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae.evaluation.metrics import confusion, measures, per_class
from mae.evaluation.protocols.outcome import Outcome

_MOST_CLASSES_OF_MATRIX = 100
MEASURES = {"top1": "top-1", "top5": "top-5", "balanced": "balanced", "ece": "calibration error"}
"""Measures in the order in which they are shown, and their titles."""


@dataclass(frozen=True)
class Trial:
    """One fit: what was chosen for it, and its measures on the test samples."""

    seed: int
    chosen: dict[str, Any]
    fitted_on: int
    """Number of training samples."""
    measures: dict[str, float]


@dataclass(frozen=True)
class Row:
    """Result of one encoder under one protocol."""

    encoder: str
    protocol: str
    trials: list[Trial]
    """One per seed, and for few_shot one per choice of the samples."""
    per_class: list[float | None]
    """Accuracy of each class, from 0 to 1, over all trials; None for a class without test samples."""
    confusion: list[list[int]] | None
    """How often each class (row) was taken for each class (column), over all trials; None for more than 100 classes."""
    remarks: list[str]
    about: dict[str, Any]
    """Model, features and speed."""

    def mean(self, measure: str) -> float | None:
        """Return the mean of a measure over the trials; None if the row does not have it."""
        found = self._all(measure)
        return statistics.mean(found) if found else None

    def deviation(self, measure: str) -> float | None:
        """Return the sample deviation of a measure over the trials; None for fewer than two."""
        found = self._all(measure)
        return statistics.stdev(found) if len(found) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON mapping."""
        summary = {
            name: {"mean": self.mean(name), "deviation": self.deviation(name)}
            for name in MEASURES
            if self.mean(name) is not None
        }
        return {
            "encoder": self.encoder,
            "protocol": self.protocol,
            **summary,
            "remarks": self.remarks,
            "about": self.about,
            "trials": [vars(trial) for trial in self.trials],
            "per_class": self.per_class,
            "confusion": self.confusion,
        }

    def _all(self, measure: str) -> list[float]:
        return [trial.measures[measure] for trial in self.trials if measure in trial.measures]


def row_of(
    encoder: str,
    protocol: str,
    outcomes: Sequence[tuple[int, Outcome]],
    labels: NDArray[np.int64],
    remarks: Sequence[str],
    about: dict[str, Any],
) -> Row:
    """Measure the outcomes of all seeds, given as pairs of a seed and an outcome, on the labels of the test samples."""
    trials = [
        Trial(seed, outcome.chosen, outcome.fitted_on, measures(outcome.scores, labels, outcome.are_probabilities))
        for seed, outcome in outcomes
    ]
    scores = np.concatenate([outcome.scores for _, outcome in outcomes])
    everywhere = np.tile(labels, len(outcomes))
    matrix = None
    if scores.shape[1] <= _MOST_CLASSES_OF_MATRIX:
        matrix = confusion(scores, everywhere).tolist()
    return Row(encoder, protocol, trials, per_class(scores, everywhere), matrix, list(remarks), about)


def cells(row: Row) -> list[str]:
    """Return a row of the table: encoder, protocol, what was chosen, and each measure as mean ± deviation."""
    return [row.encoder, row.protocol, chosen(row), *(_figure(row, name) for name in MEASURES), "; ".join(row.remarks)]


HEADER = ("encoder", "protocol", "chosen on held-out training samples", *MEASURES.values(), "remarks")
"""Titles of the columns of `cells`."""


def markdown(rows: Sequence[Row]) -> str:
    """Return all rows as a table in Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def plain(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of the figures of all rows, in columns, for a terminal."""
    short = ("encoder", "protocol", *MEASURES, "remarks")
    lines = [short, *((each[0], each[1], *each[3:]) for each in map(cells, rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _figure(row: Row, measure: str) -> str:
    mean, deviation = row.mean(measure), row.deviation(measure)
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def chosen(row: Row) -> str:
    """Return what was chosen; of several trials, each choice once."""
    names = ("feature", "k", "C", "shots", "lr", "epochs", "steps", "seconds")
    each = [", ".join(_word(name, t.chosen[name]) for name in names if name in t.chosen) for t in row.trials]
    return " / ".join(dict.fromkeys(each))


def _word(name: str, value: Any) -> str:
    return str(value) if name == "feature" else f"{name} {value:g}"
