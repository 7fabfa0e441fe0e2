"""Fine-tuning task: classify labelled images with a head on the encoder's tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mae.data.batch import Batch, BatchRecipe, TrainingBatches
from mae.data.eval_batches import labelled_subset
from mae.data.images.erasing import erase
from mae.data.index import ShardIndex
from mae.data.labelled_sets import (
    OverlapLimit,
    agreed_names,
    count_classes,
    empty_classes,
    limit_overlap,
    require_two_classes,
)
from mae.data.loader import normalize
from mae.data.plan import BatchPlan
from mae.data.prepare import open_shards
from mae.data.source import IndexedSource, statistics_of
from mae.errors import first_of
from mae.models.classifier import build_classifier
from mae.models.description import ModelDescription, describe_model
from mae.models.flops import classifier_flops
from mae.models.freezing import freeze
from mae.models.weights import load_encoder
from mae.tasks.classification_loss import ClassificationLoss, balanced_weights
from mae.tasks.finetune_settings import FinetuneSettings
from mae.training.optimizer import parameter_groups
from mae.training.origin import find_origin, with_statistics
from mae.training.run_folder.folder import RunFolder
from mae.training.task import LossOf, Task


@dataclass(frozen=True)
class Finetuning(Task):
    """Classifier on labelled images."""

    settings: FinetuneSettings
    source: IndexedSource
    held_out: ShardIndex | None
    """Index of the evaluation shards."""
    names: tuple[str, ...] | None
    """Names of the classes by label, from `classes.txt` beside the training shards; None if there is none."""

    @classmethod
    def open(cls, settings: FinetuneSettings, say: Callable[[str], None]) -> "Finetuning":
        """Open the data of a run, and find its mean and std.

        Raises:
            UserError: if shards are missing or damaged, labels do not fit, or `init` is a model of another shape.
        """
        source = IndexedSource(open_shards(settings.data.shards, settings.data, say))
        task = cls.without_statistics(settings, source, say)
        return replace(task, settings=replace(settings, data=with_statistics(settings, source, say, settings.pool)))

    @classmethod
    def without_statistics(
        cls, settings: FinetuneSettings, source: IndexedSource, say: Callable[[str], None]
    ) -> "Finetuning":
        """Open the evaluation shards, and compare them with the training shards; do not find mean and std.

        Raises:
            UserError: if shards are missing or damaged, labels do not fit or are all the same, or too many samples are
                in both.
        """
        held_out = open_held_out(settings, say)
        task = cls(settings, source, held_out, agreed_names(source.index, held_out, say))
        task.say_empty_classes(say)
        require_two_classes(source.index.label, "data.shards")
        _ = task.class_weights
        if held_out is not None:
            limit = OverlapLimit(settings.eval_overlap)
            limit_overlap(source.index, held_out, limit, settings.data, say, task.subset)
        return task

    @cached_property
    def classes(self) -> int:
        """Number of classes of the training shards, with those that have a name but no sample.

        Raises:
            UserError: if samples have no label, or a label is beyond the class list, or only in the evaluation shards.
        """
        return count_classes(self.source.index, self.held_out, self.names)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of samples to train on of each class."""
        labels = self.source.index.label
        return np.bincount(labels if self.subset is None else labels[self.subset], minlength=self.classes)

    @cached_property
    def class_weights(self) -> Tensor | None:
        """Weight of each class in the loss; None if all count the same.

        Raises:
            UserError: if weights are to balance classes of which one has no sample.
        """
        return balanced_weights(self.counts, self.names) if self.settings.class_weights == "balanced" else None

    @cached_property
    def subset(self) -> NDArray[np.int64] | None:
        """Ids of the samples to train on; None for all."""
        per_class = self.settings.labels_per_class
        return None if per_class is None else labelled_subset(self.source.index, per_class, self.settings.seed)

    @property
    def unit(self) -> int:
        """Divisor of every micro-batch: the views of an image stay together, and mixup pairs images."""
        return math.lcm(self.settings.data.views_per_image, 2 if self.settings.regularization.mixes else 1)

    @property
    def noise_columns(self) -> int:
        """Number of random numbers per image in `Batch.noise`: none."""
        return 0

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of training on one image."""
        settings, data = self.settings, self.settings.data
        return classifier_flops(
            settings.model, data.size, data.channels, self.classes, settings.head, settings.pool, settings.frozen
        ).training

    @property
    def description(self) -> ModelDescription:
        """Description of the classifier."""
        data = self.settings.data
        statistics = statistics_of(data)
        described = describe_model(
            "classifier",
            self.settings.model,
            data.size,
            statistics.mean,
            statistics.std,
            data.crop_pct,
            self.names,
            data.value_range,
        )
        return replace(described, pool=self.settings.pool)

    def build_model(self) -> nn.Module:
        """Return the encoder, with random weights or those of `init`, and a new head."""
        settings, data = self.settings, self.settings.data
        torch.manual_seed(settings.seed)
        model = build_classifier(
            settings.model,
            data.size,
            data.channels,
            self.classes,
            settings.head,
            settings.regularization.drop_path,
            settings.pool,
        )
        origin = find_origin(settings.init, RunFolder(settings.run_dir), settings.model.heads)
        if origin is not None:
            weights = origin.weights(settings.model.grid(data.size), settings.model.patch, data.channels)
            load_encoder(model, weights, origin.path)
        freeze(model, settings.frozen)
        classifier: nn.Module = model
        return classifier

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups, by layer and weight decay."""
        return parameter_groups(model, self.settings.optim.weight_decay, self.settings.optim.layer_decay)

    def batches(self, plan: BatchPlan, rank: int) -> TrainingBatches:
        """Return the batches of one rank, with labels."""
        settings = self.settings
        recipe = BatchRecipe(settings.seed, settings.data, settings.augment)
        return self.source.train_batches(plan, rank, recipe, self.subset)

    def loss_of(self, images: int) -> LossOf:
        """Return the cross-entropy loss, which mixes the images first if mixup or cutmix is on.

        Raises:
            UserError: if an odd number of images is to be mixed in pairs.
        """
        regularization, statistics = self.settings.regularization, statistics_of(self.settings.data)
        regularization.require_pairs(images)
        criterion = ClassificationLoss(regularization, self.classes, self.class_weights)

        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            inputs = erase(normalize(batch.images, statistics), batch.words, self.settings.augment.erase)
            return criterion(model, inputs, batch.labels)

        return loss_of

    def say_empty_classes(self, say: Callable[[str], None]) -> None:
        """Report the classes that have no sample to train on.

        Raises:
            UserError: if labels do not fit.
        """
        if empty := empty_classes(self.counts, self.names):
            say(
                f"warning: {len(empty)} of {self.classes} classes have no training sample, so they are not learned: "
                f"{first_of(empty)}"
            )


def open_held_out(settings: FinetuneSettings, say: Callable[[str], None]) -> ShardIndex | None:
    """Open the evaluation shards and return their index, or None without `eval_shards`."""
    if not settings.eval_shards:
        return None
    # data.index names the index of the training shards.
    return open_shards(settings.eval_shards, replace(settings.data, index=None), say)
