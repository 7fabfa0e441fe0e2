"""Support vector machine with an RBF kernel: what can be had from pixels without any encoder."""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from mae import keyed
from mae.evaluation.feature_set import PIXELS, FeatureSet, limited, split_off
from mae.evaluation.protocols.outcome import Outcome, accuracy
from mae.keyed import Purpose

STRENGTHS = (1.0, 10.0)
"""Values of scikit-learn's C to choose from."""
_MOST_FITTED = 10_000
_QUERIES_AT_ONCE = 1_000


def judge(train: FeatureSet, test: FeatureSet, classes: int, seed: int) -> Outcome:
    """Choose C on held-out training samples, and fit at most 10,000 samples, because time grows with their square.

    C is chosen with 2,500. Each class is among them, however rare it is. The width of the kernel is scikit-learn's
    `scale`.
    """
    fit_ids, held_out_ids = split_off(train.labels, seed)
    held_out, quarter = train.take(held_out_ids), _some(train, fit_ids, seed, _MOST_FITTED // 4)
    queries = held_out.of(PIXELS)
    measured = [(accuracy(scores_of(quarter, queries, c, classes), held_out.labels), c) for c in STRENGTHS]
    best, strength = max(measured, key=lambda found: found[0])
    fitted = _some(train, np.arange(len(train)), seed, _MOST_FITTED)
    scores = scores_of(fitted, test.of(PIXELS), strength, classes)
    return Outcome(scores, False, len(fitted), {"feature": PIXELS, "C": strength, "held_out_top1": best})


def scores_of(known: FeatureSet, queries: NDArray[np.float32], strength: float, classes: int) -> NDArray[np.float64]:
    """Fit a machine, and return how far each query is on the side of each class: float64 [queries, classes].

    The kernel is exp(-gamma |x - y|^2), with scikit-learn's gamma `scale`: 1 / (number of features * their variance).
    """
    fitted = known.of(PIXELS).astype(np.float64)
    gamma = 1 / (fitted.shape[1] * (fitted.var() or 1.0))
    # Kernels as products of matrices take a third of the time of scikit-learn's, which takes them pair by pair.
    model = SVC(C=strength, kernel="precomputed", break_ties=True, decision_function_shape="ovr")
    model.fit(rbf_kernel(fitted, fitted, gamma), known.labels)
    blocks = np.array_split(queries.astype(np.float64), -(-len(queries) // _QUERIES_AT_ONCE))
    decision = np.concatenate([model.decision_function(rbf_kernel(block, fitted, gamma)) for block in blocks])
    if decision.ndim == 1:
        decision = np.stack([-decision, decision], axis=1)
    # A class without samples is never chosen. Its score is finite, as measures want it.
    everywhere = np.full((len(queries), classes), decision.min() - 1)
    everywhere[:, model.classes_] = decision
    return everywhere


def _some(train: FeatureSet, ids: NDArray[np.int64], seed: int, most: int) -> FeatureSet:
    order = keyed.shuffled(keyed.key(Purpose.HELD_OUT, seed, 2), ids)
    return train.take(limited(order, train.labels, most))
