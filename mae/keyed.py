"""Keyed randomness: every random number is a pure function of what it is for.

No generator carries state from one sample or step to the next, so nothing random has to be saved, and
a crop or a mask is the same whichever worker or process draws it, before or after a resume.

The generator is SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195): its output function
applied to a counter. It is written out here, in six lines of integer arithmetic, because the streams of
library generators may change between releases while the order of a run must not.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent. Never renumber."""

    ORDER = 1
    CROP = 2
    MASK = 3
    STEP = 4
    LABELS = 5
    AUGMENT = 6
    PACK = 7
    PICTURE = 8
    STREAM = 9


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: a bijection of the 64-bit integers whose every output bit depends on all."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key(purpose: Purpose, *parts: int) -> np.uint64:
    """One 64-bit key from a purpose and any number of integers, such as (seed, epoch)."""
    state = np.array([int(purpose)], dtype=np.uint64)
    for part in parts:
        state = mix(state + _GOLDEN) ^ np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return np.uint64(mix(state + _GOLDEN)[0])


def bits(base: np.uint64, ids: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """`count` random words for each id: uint64 [ids, count]."""
    streams = mix(mix(ids.astype(np.uint64) + _GOLDEN) ^ base)
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return mix(streams[:, None] + counters[None, :])


def uniform(base: np.uint64, ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each id, multiples of 2**-53: float64 [ids, count]."""
    return (bits(base, ids, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_float32(base: np.uint64, ids: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """`count` numbers in [0, 1) for each id, multiples of 2**-24 and so exact: float32 [ids, count]."""
    return (bits(base, ids, count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
