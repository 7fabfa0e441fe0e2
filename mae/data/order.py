"""The order of training: a pure function of (seed, epoch, position).

The only state of the data is one integer, the number of samples consumed. Each epoch is a permutation of
all samples, computed point by point by a keyed bijection, so any position is reached in O(1) and nothing
has to be stored, replayed or agreed upon between processes.
"""

import numpy as np
from numpy.typing import NDArray

from mae import keyed
from mae.keyed import Purpose

ORDER_VERSION = 1
"""Part of every checkpoint: a run may only be resumed under the order it was started with."""

_ROUNDS = 6


def sample_ids(seed: int, count: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids and epochs of the positions start ... stop - 1 of an endless stream over `count` samples.

    Position p belongs to epoch p // count; within an epoch every sample occurs exactly once. A batch that
    reaches over the end of an epoch goes on with the next one: nothing is dropped or repeated.

    Returns:
        (sample ids, epochs), both int64 [stop - start].
    """
    epochs, places = np.divmod(np.arange(start, stop, dtype=np.int64), count)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = permute(places[chosen], count, keyed.key(Purpose.ORDER, seed, int(epoch)))
    return ids, epochs


def permute(places: NDArray[np.int64], count: int, base: np.uint64) -> NDArray[np.int64]:
    """Map `places`, each in 0 ... count - 1, by the bijection of that range which `base` selects.

    A balanced Feistel network permutes the smallest range 4**k >= count; a value that falls outside is sent
    through again until it comes back inside ("cycle walking", Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9).
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    values = _feistel(places.astype(np.uint64), half, base)
    outside = values >= count
    while outside.any():
        values[outside] = _feistel(values[outside], half, base)
        outside = values >= count
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: np.uint64, base: np.uint64) -> NDArray[np.uint64]:
    """Permute the integers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_ in range(_ROUNDS):
        scrambled = keyed.mix(right + keyed.mix(np.array([base]) + np.uint64(round_)))
        left, right = right, left ^ (scrambled & mask)
    return (left << half) | right
