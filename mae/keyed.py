"""Keyed randomness: every random number is a pure function of its purpose and its key.

No generator state passes from one sample or step to the next, so a checkpoint stores no random state. A crop or a
mask is the same in any worker or process, before and after a resume.

The generator is the output function of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195), applied
to a counter. It is written here because the numbers of library generators may change between releases.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """Purpose of a random number. Numbers for different purposes are independent. Never renumber."""

    ORDER = 1
    CROP = 2
    MASK = 3
    STEP = 4
    LABELS = 5
    AUGMENT = 6
    PACK = 7
    PICTURE = 8
    STREAM = 9
    BASELINE = 10
    HELD_OUT = 11
    FEW_SHOT = 12
    EVALUATION = 13
    ERASE = 14


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's output function: a bijection of 64-bit integers; each output bit depends on all input bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key(purpose: Purpose, *parts: int) -> np.uint64:
    """Return a 64-bit key for a purpose and any number of integers, such as (seed, epoch)."""
    state = np.array([int(purpose)], dtype=np.uint64)
    for part in parts:
        state = mix(state + _GOLDEN) ^ np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return np.uint64(mix(state + _GOLDEN)[0])


def bits(base: np.uint64, ids: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Return `count` random 64-bit words for each id: uint64 [ids, count]."""
    streams = mix(mix(ids.astype(np.uint64) + _GOLDEN) ^ base)
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return mix(streams[:, None] + counters[None, :])


def shuffled(base: np.uint64, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ids in an order in which the place of two of them depends on no third."""
    return ids[np.argsort(bits(base, ids, 1)[:, 0], kind="stable")]


def uniform(base: np.uint64, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each id, multiples of 2**-53: float64 [ids, count]."""
    return (bits(base, ids, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_float32(base: np.uint64, ids: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Return `count` numbers in [0, 1) for each id, multiples of 2**-24 (exact in float32): float32 [ids, count]."""
    return (bits(base, ids, count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
