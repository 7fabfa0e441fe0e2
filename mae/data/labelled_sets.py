"""Labelled shards to train on and to measure on: their classes must agree, and they must not share samples."""

from collections.abc import Callable
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mae.classes import require_same_classes
from mae.data.classes import CLASSES_FILE, class_names
from mae.data.index import ShardIndex
from mae.data.overlap import shared_samples
from mae.data.settings import DataSettings
from mae.errors import UserError, first_of


def agreed_names(
    trained: ShardIndex, held_out: ShardIndex | None, say: Callable[[str], None]
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
        require_same_classes(names, "data.shards", held_out_names, "eval_shards")
    elif (names is None) != (held_out_names is None):
        without = "data.shards" if names is None else "eval_shards"
        say(f"{without} have no {CLASSES_FILE}: their labels are taken by number")
    return names


def count_classes(trained: ShardIndex, held_out: ShardIndex | None, names: tuple[str, ...] | None) -> int:
    """Return the number of classes of the training shards, with those that have a name but no sample.

    Raises:
        UserError: if samples have no label, or a label is beyond the class list, or only in the evaluation shards.
    """
    classes = trained.class_count(names)
    if held_out is not None and (count := held_out.label_count()) > classes:
        raise UserError(
            f"eval_shards have labels up to {count - 1}, data.shards only up to {classes - 1}; pack both with the "
            "same class list"
        )
    return classes


def limit_overlap(
    trained: ShardIndex,
    held_out: ShardIndex,
    share: float,
    data: DataSettings,
    say: Callable[[str], None],
    subset: NDArray[np.int64] | None = None,
    setting: str = "eval_overlap",
) -> None:
    """Report evaluation samples that are also training samples, of which only those in `subset` count if it is given.

    The error names `setting` as what limits the share.

    Raises:
        UserError: if they are more than a `share` of the evaluation samples.
    """
    most = int(share * len(held_out))
    found = list(islice(shared_samples(trained, held_out, data, subset), most + 1))
    if not found:
        return
    count = f"{len(found)}{' or more' if len(found) > most else ''} of {len(held_out):,} evaluation samples"
    pairs = first_of([f"{sample.second} is {sample.first}" for sample in found], most=2)
    if len(found) > most:
        raise UserError(
            f"{count} are also training samples: {pairs}; allowed: {share:.1%} ({setting}). Give separate shards as "
            "eval_shards: accuracy on training samples tells nothing"
        )
    say(f"warning: {count} are also training samples: {pairs}")
