"""Few-shot probe: logistic regression on a few labelled samples of each class, repeated for several choices of them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mae import keyed
from mae.data.eval_batches import first_per_class
from mae.errors import UserError
from mae.evaluation.feature_set import FeatureSet, split_off
from mae.evaluation.protocols.linear import STRENGTHS
from mae.evaluation.protocols.logistic import probabilities
from mae.evaluation.protocols.outcome import Outcome, accuracy
from mae.keyed import Purpose


def judge(
    train: FeatureSet,
    test: FeatureSet,
    classes: int,
    seed: int,
    kinds: Sequence[str],
    device: torch.device,
    shots: int,
    splits: int,
) -> list[Outcome]:
    """Fit `shots` samples of each class, for `splits` choices of the samples; return the outcome of each.

    The kind of feature and C are chosen on held-out training samples, by the mean accuracy of all choices.

    Raises:
        UserError: if a class has fewer samples to choose from.
    """
    fit_ids, held_out_ids = split_off(train.labels, seed)
    held_out = train.take(held_out_ids)
    few = [train.take(choose(train.labels, fit_ids, shots, seed, split)) for split in range(splits)]
    measured = []
    for kind in kinds:
        queries = held_out.of(kind)
        each = [probabilities(one.of(kind), one.labels, queries, STRENGTHS, classes, device) for one in few]
        for strength in STRENGTHS:
            mean = np.mean([accuracy(found[strength], held_out.labels) for found in each])
            measured.append((float(mean), kind, strength))
    best, kind, strength = max(measured, key=lambda found: found[0])
    chosen = {"feature": kind, "C": strength, "shots": shots, "held_out_top1": best}
    queries = test.of(kind)
    outcomes = []
    for split, one in enumerate(few):
        found = probabilities(one.of(kind), one.labels, queries, (strength,), classes, device)
        outcomes.append(Outcome(found[strength], True, len(one), chosen | {"split": split}))
    return outcomes


def choose(labels: NDArray[np.int64], ids: NDArray[np.int64], shots: int, seed: int, split: int) -> NDArray[np.int64]:
    """Return `shots` of the ids for each class, in ascending order.

    Raises:
        UserError: if a class has fewer.
    """
    order = keyed.shuffled(keyed.key(Purpose.FEW_SHOT, seed, split), ids)
    for label in np.unique(labels).tolist():
        there = int((labels[ids] == label).sum())
        if there < shots:
            raise UserError(
                f"class {label} has {there} training samples that are not held out, but few_shot needs {shots} "
                f"(shots); allowed: 1 to {there}, or leave few_shot out of the protocols"
            )
    return first_per_class(labels, order, shots)
