"""Logistic regression by L-BFGS, on any device: the objective of scikit-learn's `LogisticRegression`.

It is written here because scikit-learn needs 40 s for 60,000 features of 256 values on a CPU core, and this a tenth.
The difference is the basis: along the principal axes of the features, scaled by the curvature that the objective has
there at its start, all directions are about equally steep, so a few dozen steps are enough.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_MOST_STEPS = 100
_HISTORY = 20
# Greatest component of the gradient, per sample, at which the solution counts as found; scikit-learn stops at 1e-4.
_GRADIENT = 1e-5


def probabilities(
    known: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    strengths: Sequence[float],
    classes: int,
    device: torch.device,
) -> dict[float, NDArray[np.float64]]:
    """Fit a logistic regression for each strength C, and return the probabilities of the queries for each.

    Minimise sum(cross-entropy) + |weights|^2 / (2 C), in float64, on features that are standardised by the mean and
    deviation of the known samples. The intercept is free.

    Args:
        known: Features of the samples to fit [samples, feature].
        labels: Their labels. A class without samples gets the probability 0.
        queries: Features of the samples to classify [queries, feature].
        strengths: Values of C; small ones keep the weights small.
        classes: Number of classes.
        device: Where to compute.

    Returns:
        For each C, float64 [queries, classes].
    """
    seen, targets = np.unique(labels, return_inverse=True)
    features = torch.from_numpy(known).to(device, torch.float64)
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    deviation[deviation == 0] = 1.0  # a feature without variation tells nothing
    standard = (features - mean) / deviation
    variances, axes = torch.linalg.eigh(standard.T @ standard)
    rotated = standard @ axes
    asked = ((torch.from_numpy(queries).to(device, torch.float64) - mean) / deviation) @ axes
    spread = (1 - 1 / len(seen)) / len(seen)  # variance of a class's indicator where all classes are as probable
    wanted, found = torch.from_numpy(targets).to(device), {}
    # Each solution is a good start for the next strength.
    weights = torch.zeros(rotated.shape[1] + 1, len(seen), dtype=torch.float64, device=device)
    for strength in sorted(strengths):
        scale = (variances.clamp_min(0) * spread + 1 / strength).rsqrt()[:, None]
        weights = _minimise(rotated, wanted, weights, scale, strength, spread)
        scores = (asked @ weights[:-1] + weights[-1]).softmax(dim=1).cpu().numpy()
        everywhere = np.zeros((len(queries), classes))
        everywhere[:, seen] = scores
        found[strength] = everywhere
    return {strength: found[strength] for strength in strengths}


def _minimise(
    features: Tensor, targets: Tensor, start: Tensor, scale: Tensor, strength: float, spread: float
) -> Tensor:
    """Return the best weights, whose last row is the intercept; `scale` makes all directions about equally steep."""
    scales = torch.cat([scale, scale.new_full((1, 1), (spread * len(features)) ** -0.5)])
    scaled = (start / scales).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=_MOST_STEPS,
        history_size=_HISTORY,
        tolerance_grad=_GRADIENT,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = scaled * scales
        loss = functional.cross_entropy(torch.addmm(weights[-1], features, weights[:-1]), targets, reduction="sum")
        loss = (loss + weights[:-1].square().sum() / (2 * strength)) / len(features)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (scaled * scales).detach()
