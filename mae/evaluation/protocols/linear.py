"""Linear probe: logistic regression on frozen features."""

from collections.abc import Sequence

import torch

from mae import keyed
from mae.evaluation.feature_set import FeatureSet, limited, split_off
from mae.evaluation.protocols.logistic import probabilities
from mae.evaluation.protocols.outcome import Outcome, accuracy
from mae.keyed import Purpose

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C to choose from; small ones keep the weights small."""
_MOST_TO_CHOOSE_BY = 10_000


def judge(
    train: FeatureSet, test: FeatureSet, classes: int, seed: int, kinds: Sequence[str], device: torch.device
) -> Outcome:
    """Choose the kind of feature and C on held-out training samples, and fit all training samples.

    To choose, at most 10,000 samples are fitted; each class is among them, however rare it is.
    """
    fit_ids, held_out_ids = split_off(train.labels, seed)
    order = keyed.shuffled(keyed.key(Purpose.HELD_OUT, seed, 1), fit_ids)
    fit = train.take(limited(order, train.labels, _MOST_TO_CHOOSE_BY))
    held_out = train.take(held_out_ids)
    measured = [
        (accuracy(scores, held_out.labels), kind, strength)
        for kind in kinds
        for strength, scores in probabilities(
            fit.of(kind), fit.labels, held_out.of(kind), STRENGTHS, classes, device
        ).items()
    ]
    best, kind, strength = max(measured, key=lambda found: found[0])
    found = probabilities(train.of(kind), train.labels, test.of(kind), (strength,), classes, device)
    chosen = {"feature": kind, "C": strength, "held_out_top1": best}
    return Outcome(found[strength], True, len(train), chosen)
