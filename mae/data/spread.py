"""Samples spread evenly over a set."""

import numpy as np
from numpy.typing import NDArray


def spread_evenly(count: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` of the numbers below `count`, in ascending order: the first, the last, and some between."""
    return np.linspace(0, max(count - 1, 0), min(most, count)).astype(np.int64)
