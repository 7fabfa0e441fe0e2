"""Settings of fine-tuning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from mae.data.images.augment import AugmentSettings
from mae.models.freezing import frozen_blocks
from mae.models.vit import TokenKind
from mae.schema import Before, MayChange
from mae.settings import check
from mae.tasks.classification_loss import RegularizationSettings
from mae.training.inherited import shape_of_init
from mae.training.optimizer import OptimSettings
from mae.training.settings import TrainSettings


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
    """Fine-tune an encoder with a head on its cls token; the defaults are the paper's ViT-B/16 recipe.

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
    augment: AugmentSettings = field(
        default_factory=lambda: AugmentSettings(crop_scale=(0.08, 1.0), rand_augment="torchvision-9")
    )
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
        frozen_blocks(self.freeze, self.model.shape.depth)
        self.model.grid(self.data.size)
        check(self.data.reader == "indexed", "data.reader", self.data.reader, "indexed, which knows all labels")

    @staticmethod
    def inherited(given: Mapping[str, str]) -> list[str]:
        """Return flags for what is not given, and is as in the model that `init` names."""
        return shape_of_init(given)
