"""Settings of fine-tuning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from mae.data.images.augment import AugmentSettings
from mae.data.images.rand_augment import name_of
from mae.models.freezing import frozen_blocks
from mae.models.vit import TokenKind
from mae.schema import Before, Formerly, MayChange
from mae.settings import check
from mae.tasks.classification_loss import RegularizationSettings
from mae.training.inherited import shape_of_init
from mae.training.optimizer import OptimSettings
from mae.training.settings import TrainSettings


@dataclass(frozen=True)
class FinetuneOptimSettings(OptimSettings):
    """Optimiser with layer decay; the defaults are the published ones for a ViT-B that predicted normalised pixels."""

    base_lr: Annotated[float, Before(1e-3)] = 5e-4
    """Learning rate per 256 images of the global batch; the peak is base_lr * batch_size / 256."""
    warmup_epochs: float = 5.0
    """Epochs over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    layer_decay: Annotated[float, Before(0.75)] = 0.65
    """Factor between the learning rate of a block and that of the next block; 1 turns layer decay off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass(frozen=True)
class FinetuneAugmentSettings(AugmentSettings):
    """Augmentation of labelled images; the defaults are published for a ViT that predicted normalised pixels."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a share of the image's area."""
    rand_augment: Annotated[str, Formerly(name_of), Before("torchvision-9")] = "rand-m9-mstd0.5-inc1"
    """Random changes of colour and shape. none; a string of timm, such as rand-m9-mstd0.5-inc1, which the published
    fine-tuning uses (m: magnitude, mstd: its noise, n: number of operations, p: probability of each, inc1: all grow
    with m); or torchvision-N: torchvision's two operations of magnitude N, 0 to 30, which are weaker, but change nearly
    all images."""
    erase: Annotated[float, Before(0.0)] = 0.25
    """Probability that a box of an image is filled with noise (timm's random erasing, mode pixel). Published: 0.25
    after pretraining with normalised targets, else 0."""


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """Fine-tune an encoder with an MLP head on its cls token; configs/finetune/ has the published recipes.

    The defaults are the published ones for a ViT-B/16 that predicted normalised pixels, which has a linear head on the
    mean of its patch tokens there.
    The shape of the encoder and the size of the images are those of the model that `init` names, unless they are given.
    """

    EXAMPLE: ClassVar = "mae finetune --init runs/first --data.shards 'train-*.tar' --run_dir runs/two"
    FIRST: ClassVar = (*TrainSettings.FIRST, "optim.layer_decay", "eval_shards")

    head: Literal["mlp", "linear"] = "mlp"
    """Classifier on the pooled tokens; mlp: one hidden layer of the encoder's width, with GELU; linear: none."""
    pool: TokenKind = "cls"
    """Tokens that the head sees. cls: the normed cls token. avg: the mean of the patch tokens, and a new norm after it.
    cls+avg: both, after the encoder's norm."""
    freeze: str = "none"
    """Part of the encoder that is not trained, and has no stochastic depth. none; encoder: all but the head and the new
    norm of `avg`; blocks:N: the patch embedding, the cls token, the positions and the first N blocks."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of a class with n of N training samples, of K classes, has the weight N / (K n)."""
    batch_size: int = 1024
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    eval_shards: MayChange[tuple[str, ...]] = ()
    """Labelled tar shards on which accuracy is measured, every eval_every epochs and at the end."""
    eval_every: MayChange[float] = 1.0
    """Epochs between evaluations."""
    eval_overlap: Annotated[MayChange[float], Before(1.0)] = 0.01
    """Largest share of the evaluation samples that may also be training samples; such samples are counted and named."""
    patience: int | None = None
    """Number of evaluations without a better accuracy after which the run ends. None: it trains for all epochs."""
    labels_per_class: int | None = None
    """Number of samples of each class to train on, chosen by the seed; None: all samples."""
    augment: FinetuneAugmentSettings = field(default_factory=FinetuneAugmentSettings)
    regularization: RegularizationSettings = field(default_factory=RegularizationSettings)
    optim: FinetuneOptimSettings = field(default_factory=FinetuneOptimSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        labels = self.labels_per_class
        check(labels is None or labels >= 1, "labels_per_class", labels, "1 or more, or None")
        check(self.patience is None or self.patience >= 1, "patience", self.patience, "1 or more, or None")
        measured = self.patience is None or bool(self.eval_shards)
        check(measured, "patience", self.patience, "None without eval_shards, on which accuracy is measured")
        check(0 < self.eval_every < math.inf, "eval_every", self.eval_every, "above 0")
        check(0 <= self.eval_overlap <= 1, "eval_overlap", self.eval_overlap, "from 0 to 1")
        _ = self.frozen
        self.model.grid(self.data.size)
        check(self.data.reader == "indexed", "data.reader", self.data.reader, "indexed, which knows all labels")

    @property
    def frozen(self) -> int | None:
        """Number of blocks that are not trained, as `frozen_blocks` returns it.

        Raises:
            UserError: if `freeze` names no part of the encoder.
        """
        return frozen_blocks(self.freeze, self.model.shape.depth)

    @staticmethod
    def inherited(given: Mapping[str, str]) -> list[str]:
        """Return flags for what is not given, and is as in the model that `init` names."""
        return shape_of_init(given)
