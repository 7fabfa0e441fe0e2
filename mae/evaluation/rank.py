"""Rank of features: how many directions they use (RankMe, Garrido et al. 2023, arXiv 2210.02885)."""

import numpy as np
import torch
from numpy.typing import NDArray

# Added to each share, as published.
_EPSILON = 1e-7


def effective_rank(features: NDArray[np.float32], device: torch.device) -> float:
    """Return the exponential of the entropy of the singular values, which are divided by their sum.

    It is 1 for features along one direction, and n for n directions that are equally strong.

    Args:
        features: Finite features [samples, feature]; their mean is not subtracted, as published.
        device: Where to compute.
    """
    values = torch.linalg.svdvals(torch.from_numpy(features).to(device, torch.float64))
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + _EPSILON
    return float((-(shares * shares.log()).sum()).exp())
