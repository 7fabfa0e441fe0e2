"""k-nearest neighbours: the training samples with the most similar features vote, the more similar the more.

The weight of a vote is exp(cosine similarity / T), as in Wu et al. 2018 (arXiv 1805.01978). All pairs are compared, so
the result is exact.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mae.evaluation.feature_set import FeatureSet, split_off
from mae.evaluation.protocols.outcome import Outcome, accuracy

NEIGHBOURS = (5, 10, 20, 50, 100, 200)
"""Numbers of neighbours to choose from."""
TEMPERATURE = 0.07
# Similarities that are in memory at once; 4 bytes each.
_PAIRS_AT_ONCE = 1 << 27


def judge(
    train: FeatureSet, test: FeatureSet, classes: int, seed: int, kinds: Sequence[str], device: torch.device
) -> Outcome:
    """Choose the kind of feature and k on held-out training samples, and let all training samples vote."""
    fit, held_out = (train.take(ids) for ids in split_off(train.labels, seed))
    measured = [
        (accuracy(scores, held_out.labels), kind, k)
        for kind in kinds
        for k, scores in votes(fit.of(kind), fit.labels, held_out.of(kind), NEIGHBOURS, classes, device).items()
    ]
    best, kind, k = max(measured, key=lambda found: found[0])
    ((_, scores),) = votes(train.of(kind), train.labels, test.of(kind), (k,), classes, device).items()
    chosen = {"feature": kind, "k": k, "temperature": TEMPERATURE, "held_out_top1": best}
    return Outcome(scores, True, len(train), chosen)


def votes(
    known: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    numbers: Sequence[int],
    classes: int,
    device: torch.device,
) -> dict[int, NDArray[np.float64]]:
    """Return the shares of the votes for each class, float64 [queries, classes], for each number of neighbours.

    Args:
        known: Features of the samples that vote [samples, feature].
        labels: Their labels.
        queries: Features of the samples to classify [queries, feature].
        numbers: Numbers of neighbours; one beyond the number of samples stands for all of them.
        classes: Number of classes.
        device: Where similarities are computed.
    """
    bank, classes_of = functional.normalize(torch.from_numpy(known).to(device)), torch.tensor(labels, device=device)
    found: dict[int, list[NDArray[np.float64]]] = {k: [] for k in numbers}
    most = min(max(numbers), len(bank))
    for block in torch.split(torch.from_numpy(queries), max(1, _PAIRS_AT_ONCE // len(bank))):
        similar, nearest = (functional.normalize(block.to(device)) @ bank.T).topk(most, dim=1)
        # Only the differences of similarities matter, and the greatest weight is then 1.
        weights = ((similar - similar[:, :1]).double() / TEMPERATURE).exp()
        for k, parts in found.items():
            parts.append(_shares(weights[:, :k], classes_of[nearest[:, :k]], classes))
    return {k: np.concatenate(parts) for k, parts in found.items()}


def _shares(weights: Tensor, labels: Tensor, classes: int) -> NDArray[np.float64]:
    total = torch.zeros(len(weights), classes, dtype=torch.float64, device=weights.device)
    total.scatter_add_(1, labels, weights)
    shares: NDArray[np.float64] = (total / total.sum(dim=1, keepdim=True)).cpu().numpy()
    return shares
