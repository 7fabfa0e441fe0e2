"""Accuracies with few labels and without fine-tuning: of a frozen encoder, of an untrained one, and of the pixels."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mae.data.eval_batches import labelled_subset
from mae.data.index import ShardIndex
from mae.data.prepare import open_shards
from mae.data.settings import DataSettings
from mae.evaluation.feature_set import KINDS, PIXELS, FeatureSet
from mae.evaluation.features import Extraction, encoder_features, pixels, untrained_features
from mae.evaluation.protocols import linear, svm
from mae.evaluation.protocols.outcome import Outcome, accuracy
from mae.evaluation.seeds import Cell
from mae.inference.image_set import ShardImages
from mae.inference.model import Model
from mae.inference.parts import compute_parts, part_ranges
from mae.models.description import ModelDescription

FROZEN, UNTRAINED = "linear probe: pretrained", "linear probe: untrained"
PROBED_PIXELS, SEPARATED_PIXELS = "linear probe: pixels", "SVM: pixels"
_STRENGTH = 10.0  # C of the support vector machine; not tuned

Judge = Callable[[FeatureSet, FeatureSet, int, int], Outcome]
"""Fit the first set and classify the second, whose number of classes and the seed follow."""


Sets = tuple[FeatureSet, FeatureSet]
"""Features to fit, and features to classify."""


class _Row(NamedTuple):
    sets: Sequence[Sets]
    """What is judged: one pair for all seeds, or one per seed."""
    judge: Judge


class _Shards(NamedTuple):
    samples: ShardIndex
    data: DataSettings


def frozen_cells(
    model: Model, train: Sequence[str], test: Sequence[str], labels: Mapping[str, int | None], seeds: int
) -> list[Cell]:
    """Return the rows of all that is not fine-tuned, with the labels that fine-tuning has for each seed.

    The judges are those of `mae evaluate`. The linear probe chooses features and C on a tenth of these labels.

    Args:
        model: Pretrained model.
        train: Labelled shards to fit on.
        test: Labelled shards to measure on.
        labels: Labels per class by the name of their column; None: all labels.
        seeds: Number of choices of the labels, and of untrained encoders.
    """
    known, asked = (_opened(shards, model.description) for shards in (train, test))
    classes = known.samples.label_count()
    cells = []
    for name, row in _rows(model, known, asked, seeds).items():
        for column, per_class in labels.items():
            accuracies = []
            for seed in range(seeds):
                fitted, measured = row.sets[min(seed, len(row.sets) - 1)]
                few = fitted.take(_chosen(known.samples, per_class, seed))
                accuracies.append(accuracy(row.judge(few, measured, classes, seed).scores, measured.labels))
            cells.append(Cell(name, column, tuple(accuracies)))
    return cells


def _rows(model: Model, known: _Shards, asked: _Shards, seeds: int) -> dict[str, _Row]:
    def sets(extraction: Extraction) -> Sets:
        return _features(extraction, known), _features(extraction, asked)

    description, device = model.description, model.device
    of_pixels = [sets(pixels(description))]
    random = [sets(untrained_features(description, seed, device)) for seed in range(seeds)]
    probe, plain = (partial(linear.judge, kinds=kinds, device=device) for kinds in (KINDS, (PIXELS,)))
    return {
        FROZEN: _Row([sets(encoder_features(model))], probe),
        UNTRAINED: _Row(random, probe),
        PROBED_PIXELS: _Row(of_pixels, plain),
        SEPARATED_PIXELS: _Row(of_pixels, _separate),
    }


def _separate(known: FeatureSet, asked: FeatureSet, classes: int, seed: int) -> Outcome:
    """Judge pixels as the protocol `svm` does, but with a fixed C: a handful of held-out labels chooses a worse one."""
    scores = svm.scores_of(known, asked.of(PIXELS), _STRENGTH, classes)
    return Outcome(scores, False, len(known), {"feature": PIXELS, "C": _STRENGTH})


def _opened(shards: Sequence[str], description: ModelDescription) -> _Shards:
    data = DataSettings(shards=tuple(shards), image_size=description.image_size, channels=description.channels)
    return _Shards(open_shards(data.shards, data, lambda text: None), data)


def _features(extraction: Extraction, shards: _Shards) -> FeatureSet:
    """Compute features without the cache, into which small sets are not worth writing."""
    images, ranges = ShardImages(*shards), part_ranges(len(shards.samples))
    parts = compute_parts(images, ranges, extraction.description, extraction.build(), 0)
    return FeatureSet(torch.cat([part.results for part in parts]).numpy(), shards.samples.label)


def _chosen(index: ShardIndex, per_class: int | None, seed: int) -> NDArray[np.int64]:
    return np.arange(len(index)) if per_class is None else labelled_subset(index, per_class, seed)
