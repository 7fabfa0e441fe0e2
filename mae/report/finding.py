"""Sentence about a run, and what sentences are made of."""

from typing import Literal, NamedTuple

from mae.report.charts import figure

Level = Literal["good", "note", "warning", "problem"]


class Finding(NamedTuple):
    """Sentence about a run, and how much it matters."""

    level: Level
    text: str


class NearestNeighbours(NamedTuple):
    """Accuracy of nearest neighbours, from 0 to 1, with the features of the model and with plain pixels."""

    features: float
    pixels: float
    samples: int
    source: str
    """What was measured, in words."""


def epoch_in_words(value: float) -> str:
    """Return a number of epochs as a person would write it."""
    return f"{value:,.0f}" if value >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f}"


def loss_in_words(value: float) -> str:
    """Return a loss with three decimals; one that is far too large without."""
    return f"{value:.3f}" if abs(value) < 100 else figure(value)
