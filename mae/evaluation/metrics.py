"""Measures of a classification; scikit-learn computes all that it has."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from mae.evaluation.protocols.outcome import accuracy

_BINS = 15
_TOP = 5


def measures(scores: NDArray[np.float64], labels: NDArray[np.int64], are_probabilities: bool) -> dict[str, float]:
    """Return top-1 and balanced accuracy; top-5 for more than five classes; calibration error of probabilities."""
    classes = scores.shape[1]
    found = {
        "top1": accuracy(scores, labels),
        "balanced": float(np.nanmean(_recalls(scores, labels))),
    }
    if classes > _TOP:
        found["top5"] = float(top_k_accuracy_score(labels, scores, k=_TOP, labels=np.arange(classes)))
    if are_probabilities:
        found["ece"] = calibration_error(scores, labels)
    return found


def calibration_error(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599), from 0 to 1.

    Samples are grouped by the probability of their predicted class into 15 bins of equal width. The error is the mean
    distance between the accuracy and the mean probability of a bin, weighted by its number of samples.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def per_class(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> list[float | None]:
    """Return the accuracy of each class, from 0 to 1; None for a class without test samples."""
    return [None if np.isnan(recall) else float(recall) for recall in _recalls(scores, labels)]


def confusion(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each class (row) was taken for each class (column)."""
    matrix: NDArray[Any] = confusion_matrix(labels, scores.argmax(axis=1), labels=np.arange(scores.shape[1]))
    return matrix.astype(np.int64)


def _recalls(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    classes = np.arange(scores.shape[1])
    recalls: NDArray[np.float64] = recall_score(
        labels, scores.argmax(axis=1), labels=classes, average=None, zero_division=np.nan
    )
    return recalls
