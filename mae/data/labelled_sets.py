"""Labelled shards to train on and to measure on: their classes must agree, and they must not share samples."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae.classes import require_same_classes
from mae.data.classes import CLASSES_FILE, class_names
from mae.data.index import ShardIndex
from mae.data.overlap import shared_samples
from mae.data.settings import DataSettings
from mae.errors import UserError, first_of


class ShardSettings(NamedTuple):
    """Names of the settings that give the shards, for messages."""

    trained: str = "data.shards"
    held_out: str = "eval_shards"


class OverlapLimit(NamedTuple):
    """Largest share of the evaluation samples that may also be training samples."""

    share: float
    setting: str = "eval_overlap"
    """What sets it, for messages."""
    held_out: str = "eval_shards"
    """Setting that gives the evaluation shards, for messages."""


def agreed_names(
    trained: ShardIndex,
    held_out: ShardIndex | None,
    say: Callable[[str], None],
    settings: ShardSettings = ShardSettings(),  # noqa: B008 - it cannot be changed
) -> tuple[str, ...] | None:
    """Return the class names of the training shards, after comparing those of the evaluation shards with them.

    Raises:
        UserError: if the lists differ.
    """
    names = class_names([entry.shard for entry in trained.entries], say)
    if held_out is None:
        return names
    held_out_names = class_names([entry.shard for entry in held_out.entries], say)
    if names is not None and held_out_names is not None:
        require_same_classes(names, settings.trained, held_out_names, settings.held_out)
    elif (names is None) != (held_out_names is None):
        without = settings.trained if names is None else settings.held_out
        say(f"{without} have no {CLASSES_FILE}: their labels are taken by number")
    return names


def count_classes(
    trained: ShardIndex,
    held_out: ShardIndex | None,
    names: tuple[str, ...] | None,
    settings: ShardSettings = ShardSettings(),  # noqa: B008 - it cannot be changed
) -> int:
    """Return the number of classes of the training shards, with those that have a name but no sample.

    Raises:
        UserError: if samples have no label, or a label is beyond the class list, or only in the evaluation shards.
    """
    classes = trained.class_count(names)
    if held_out is not None and (count := held_out.label_count()) > classes:
        raise UserError(
            f"{settings.held_out} have labels up to {count - 1}, {settings.trained} only up to {classes - 1}; pack "
            "both with the same class list"
        )
    return classes


def require_two_classes(labels: NDArray[np.int64], where: str) -> None:
    """Raise a `UserError` if samples have fewer than two classes, between which nothing can be decided."""
    if len(np.unique(labels)) < 2:
        raise UserError(f"{where} have samples of one class only, the label {labels[0]}; give samples of two or more")


def empty_classes(counts: NDArray[np.int64], names: Sequence[str] | None) -> list[str]:
    """Return the names of the classes without samples, or their labels where there are no names.

    Args:
        counts: Number of samples of each class.
        names: Names of the classes by label; None if there are none.
    """
    return [str(label) if names is None else names[label] for label in np.flatnonzero(counts == 0).tolist()]


def limit_overlap(
    trained: ShardIndex,
    held_out: ShardIndex,
    limit: OverlapLimit,
    data: DataSettings,
    say: Callable[[str], None],
    subset: NDArray[np.int64] | None = None,
) -> None:
    """Report evaluation samples that are also training samples, of which only those in `subset` count if it is given.

    Raises:
        UserError: if they are more than the limit.
    """
    most = int(limit.share * len(held_out))
    found = list(islice(shared_samples(trained, held_out, data, subset), most + 1))
    if not found:
        return
    count = f"{len(found)}{' or more' if len(found) > most else ''} of {len(held_out):,} evaluation samples"
    pairs = first_of([f"{sample.second} is {sample.first}" for sample in found], most=2)
    if len(found) > most:
        raise UserError(
            f"{count} are also training samples: {pairs}; allowed: {limit.share:.1%} ({limit.setting}). Give separate "
            f"shards as {limit.held_out}: accuracy on training samples tells nothing"
        )
    say(f"warning: {count} are also training samples: {pairs}")
