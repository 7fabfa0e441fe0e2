"""Outcome of a protocol: scores of the test samples, and what was chosen to get them."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae.errors import UserError


class Outcome(NamedTuple):
    """Scores of the test samples by one classifier."""

    scores: NDArray[np.float64]
    """One score per sample and class; the greatest decides."""
    are_probabilities: bool
    """Whether the scores of a sample are probabilities, which sum to 1."""
    fitted_on: int
    """Number of training samples that the classifier was fitted on."""
    chosen: dict[str, Any]
    """What was chosen on the held-out samples, and what is fixed."""
    remarks: tuple[str, ...] = ()
    """What a reader should know of it."""


def accuracy(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the share of samples whose label has the greatest score, from 0 to 1."""
    return float((scores.argmax(axis=1) == labels).mean())


def require_held_out(labels: NDArray[np.int64], where: str) -> None:
    """Raise a `UserError` if no class has two samples, so that none can be held out to choose by."""
    if np.bincount(labels).max() < 2:
        raise UserError(f"{where} have one sample of each class, so none can be held out; give two or more of each")
