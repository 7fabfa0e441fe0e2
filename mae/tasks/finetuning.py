"""Fine-tuning task: classify labelled images with a head on the encoder's cls token."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mae.data.batch import Batch, BatchRecipe, TrainingBatches
from mae.data.eval_batches import labelled_subset
from mae.data.images.augment import AugmentSettings
from mae.data.index import ShardIndex
from mae.data.labelled_sets import agreed_names, count_classes, limit_overlap
from mae.data.loader import normalize
from mae.data.plan import BatchPlan
from mae.data.prepare import open_shards
from mae.data.source import IndexedSource, statistics_of
from mae.errors import UserError
from mae.models.classifier import build_classifier
from mae.models.description import ModelDescription, describe_model
from mae.models.flops import classifier_flops
from mae.models.weights import load_encoder
from mae.schema import Before, MayChange
from mae.settings import check
from mae.tasks.classification_loss import ClassificationLoss, RegularizationSettings
from mae.training.optimizer import OptimSettings, parameter_groups
from mae.training.origin import find_origin, with_statistics
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings
from mae.training.task import LossOf, Task


@dataclass(frozen=True)
class FinetuneOptimSettings(OptimSettings):
    """AdamW with layer decay; the defaults are the paper's ViT-B fine-tuning recipe."""

    base_lr: float = 1e-3
    """Learning rate per 256 images of the global batch; the peak is base_lr * batch_size / 256."""
    warmup_epochs: float = 5.0
    """Epochs over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    layer_decay: float = 0.75
    """Factor between the learning rate of a block and that of the next block; 1 turns layer decay off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """Fine-tune an encoder with a head on its cls token; the defaults are the paper's ViT-B/16 recipe."""

    EXAMPLE: ClassVar = "mae finetune --init runs/first --data.shards 'train-*.tar' --run_dir runs/two"
    FIRST: ClassVar = (*TrainSettings.FIRST, "optim.layer_decay", "eval_shards")

    head: Literal["mlp", "linear"] = "mlp"
    """Classifier on the normed cls token; mlp: one hidden layer of the encoder's width, with GELU; linear: none."""
    batch_size: int = 1024
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    eval_shards: MayChange[tuple[str, ...]] = ()
    """Labelled tar shards on which accuracy is measured, every eval_every epochs and at the end."""
    eval_every: MayChange[float] = 1.0
    """Epochs between evaluations."""
    eval_overlap: Annotated[MayChange[float], Before(1.0)] = 0.01
    """Largest share of the evaluation samples that may also be training samples; such samples are counted and named."""
    labels_per_class: int | None = None
    """Number of samples of each class to train on, chosen by the seed; None: all samples."""
    augment: AugmentSettings = field(default_factory=lambda: AugmentSettings(crop_scale=(0.08, 1.0), rand_augment=9))
    regularization: RegularizationSettings = field(default_factory=RegularizationSettings)
    optim: FinetuneOptimSettings = field(default_factory=FinetuneOptimSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = self.labels_per_class
        check(labels is None or labels >= 1, "labels_per_class", labels, "1 or more, or None")
        check(0 < self.eval_every < math.inf, "eval_every", self.eval_every, "above 0")
        check(0 <= self.eval_overlap <= 1, "eval_overlap", self.eval_overlap, "from 0 to 1")
        self.model.grid(self.data.size)
        check(self.data.reader == "indexed", "data.reader", self.data.reader, "indexed, which knows all labels")


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
        return replace(task, settings=replace(settings, data=with_statistics(settings, source, say)))

    @classmethod
    def without_statistics(
        cls, settings: FinetuneSettings, source: IndexedSource, say: Callable[[str], None]
    ) -> "Finetuning":
        """Open the evaluation shards, and compare them with the training shards; do not find mean and std.

        Raises:
            UserError: if shards are missing or damaged, labels do not fit, or too many samples are in both.
        """
        held_out = open_held_out(settings, say)
        task = cls(settings, source, held_out, agreed_names(source.index, held_out, say))
        _ = task.classes  # labels that do not fit are refused before pixels are measured
        if held_out is not None:
            limit_overlap(source.index, held_out, settings.eval_overlap, settings.data, say, task.subset)
        return task

    @cached_property
    def classes(self) -> int:
        """Number of classes of the training shards, with those that have a name but no sample.

        Raises:
            UserError: if samples have no label, or a label is beyond the class list, or only in the evaluation shards.
        """
        return count_classes(self.source.index, self.held_out, self.names)

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
        return classifier_flops(settings.model, data.size, data.channels, self.classes, settings.head).training

    @property
    def description(self) -> ModelDescription:
        """Description of the classifier."""
        data = self.settings.data
        statistics = statistics_of(data)
        return describe_model(
            "classifier",
            self.settings.model,
            data.size,
            statistics.mean,
            statistics.std,
            data.crop_pct,
            self.names,
            data.value_range,
        )

    def build_model(self) -> nn.Module:
        """Return the encoder, with random weights or those of `init`, and a new head."""
        settings, data = self.settings, self.settings.data
        torch.manual_seed(settings.seed)
        drop_path = settings.regularization.drop_path
        model = build_classifier(settings.model, data.size, data.channels, self.classes, settings.head, drop_path)
        origin = find_origin(settings.init, RunFolder(settings.run_dir))
        if origin is not None:
            load_encoder(model, origin.weights(settings.model.grid(data.size)), origin.path)
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
        if regularization.mixes and images % 2:
            raise UserError(
                f"mixup and cutmix pair the images of a batch, but a process takes {images} at a time; choose a "
                "batch_size that gives each process an even number, or set regularization.mixup and "
                "regularization.cutmix to 0"
            )
        criterion = ClassificationLoss(regularization, self.classes)

        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            return criterion(model, normalize(batch.images, statistics), batch.labels)

        return loss_of


def open_held_out(settings: FinetuneSettings, say: Callable[[str], None]) -> ShardIndex | None:
    """Open the evaluation shards and return their index, or None without `eval_shards`."""
    if not settings.eval_shards:
        return None
    # data.index names the index of the training shards.
    return open_shards(settings.eval_shards, replace(settings.data, index=None), say)
