"""Features of labelled samples, and the samples that are held out to choose between kinds of features."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae import keyed
from mae.keyed import Purpose
from mae.models.readout import NORMS, TOKENS

PIXELS = "pixels"
KINDS = tuple(f"{tokens} {norm}" for norm in NORMS for tokens in TOKENS)
"""Kinds of features of an encoder: which tokens, and whether before or after the last norm."""
_HELD_OUT_SHARE = 0.1
_MOST_HELD_OUT = 2000  # but for classes of which one sample is more than their share


@dataclass(frozen=True)
class FeatureSet:
    """Features of labelled samples."""

    values: NDArray[Any]
    """float32 [samples, norms, both] of an encoder (see `mae.models.readout`), or uint8 [samples, values] of pixels."""
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_pixels(self) -> bool:
        """Whether the features are pixels, of which there is only one kind."""
        return self.values.dtype == np.uint8

    def of(self, kind: str) -> NDArray[np.float32]:
        """Return one kind of feature: float32 [samples, feature]. Pixels are from 0 to 1."""
        if kind == PIXELS:
            return self.values.astype(np.float32) / np.float32(255)
        tokens, norm = kind.split(" ")
        both = self.values[:, NORMS.index(norm)]
        width = both.shape[1] // 2
        part = {"cls": slice(0, width), "avg": slice(width, None), "cls+avg": slice(None)}[tokens]
        return np.ascontiguousarray(both[:, part])

    def take(self, ids: NDArray[np.int64]) -> "FeatureSet":
        """Return some of the samples."""
        return replace(self, values=self.values[ids], labels=self.labels[ids])


def split_off(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids of training samples to fit on, and of those that are held out to choose by.

    A tenth of each class is held out, chosen by the seed, and less where that is more than about 2,000 samples in all,
    but one of each class at least. A class of one sample is not divided.
    """
    order = keyed.shuffled(keyed.key(Purpose.HELD_OUT, seed), np.arange(len(labels)))
    share = min(_HELD_OUT_SHARE, _MOST_HELD_OUT / len(labels))
    held_out = []
    for label in np.unique(labels).tolist():
        members = order[labels[order] == label]
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held_out.append(members[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def limited(order: NDArray[np.int64], labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the first `most` ids of an order, sorted.

    If a class is not among them, its first id takes the place of the last of another class, so that samples of very
    unequal classes are still of more than one.

    Args:
        order: Ids of samples, as they are to be preferred.
        labels: Labels of all samples, by id.
        most: Number of ids to return, if there are as many; with more classes than that, some are left out.
    """
    firsts = np.sort(np.unique(labels[order], return_index=True)[1])
    preferred = np.concatenate([order[firsts], np.delete(order, firsts)])
    return np.sort(preferred[:most])
