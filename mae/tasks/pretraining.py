"""Pretraining task: reconstruct the hidden patches of unlabelled images (MAE, arXiv 2111.06377)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mae.data.batch import Batch, BatchRecipe, TrainingBatches
from mae.data.loader import normalize
from mae.data.plan import BatchPlan
from mae.data.source import Source, open_source, statistics_of
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.description import ModelDescription, describe_model
from mae.models.flops import autoencoder_flops
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.weights import load_autoencoder
from mae.schema import MayChange
from mae.settings import check
from mae.tasks.online import OnlineEvaluationSettings
from mae.training.optimizer import parameter_groups
from mae.training.origin import find_origin, with_statistics
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings
from mae.training.task import LossOf, Task


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """Pretrain a masked autoencoder; the defaults are the paper's ViT-B/16 recipe."""

    EXAMPLE: ClassVar = "mae pretrain --data.shards 'shards/train-*.tar' --run_dir runs/first"
    FIRST: ClassVar = (*TrainSettings.FIRST, "model.mask_ratio")

    epochs: float = 800.0
    """Number of times each sample is seen; the last batch is completed from the next epoch."""
    batch_size: int = 4096
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    picture_every: MayChange[int] = 5000
    """Steps between reconstruction pictures; one more is drawn at the end."""
    picture_images: MayChange[int] = 8
    """Number of images in a reconstruction picture, at most 64: always the same images under the same masks."""
    model: MaskedAutoencoderSettings = field(default_factory=MaskedAutoencoderSettings)
    evaluation: OnlineEvaluationSettings = field(default_factory=OnlineEvaluationSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.picture_every >= 1, "picture_every", self.picture_every, "1 or more")
        check(1 <= self.picture_images <= 64, "picture_images", self.picture_images, "1 to 64")
        check(
            self.augment.erase == 0,
            "augment.erase",
            self.augment.erase,
            "0 in pretraining, which would learn to predict noise",
        )
        self.model.check_image_size(self.data.size)


@dataclass(frozen=True)
class Pretraining(Task):
    """Masked autoencoder on unlabelled images."""

    settings: PretrainSettings
    source: Source

    @classmethod
    def open(cls, settings: PretrainSettings, say: Callable[[str], None]) -> "Pretraining":
        """Open the data of a run, and find its mean and std.

        Raises:
            UserError: if shards are missing or damaged, or `init` is a model of another shape.
        """
        source = open_source(settings.data, say)
        return cls(replace(settings, data=with_statistics(settings, source, say)), source)

    @property
    def unit(self) -> int:
        """Divisor of every micro-batch: the views of an image stay together."""
        return self.settings.data.views_per_image

    @property
    def noise_columns(self) -> int:
        """Number of random numbers per image: one per patch, and their order decides the mask."""
        return math.prod(self.settings.model.grid(self.settings.data.size))

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of training on one image."""
        return autoencoder_flops(self.settings.model, self.settings.data.size, self.settings.data.channels).training

    @property
    def description(self) -> ModelDescription:
        """Description of encoder and decoder."""
        data = self.settings.data
        statistics = statistics_of(data)
        return describe_model(
            "masked autoencoder",
            self.settings.model,
            data.size,
            statistics.mean,
            statistics.std,
            data.crop_pct,
            value_range=data.value_range,
        )

    def build_model(self) -> MaskedAutoencoder:
        """Return encoder and decoder, with random weights or those of `init`."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        model = MaskedAutoencoder(settings.model, settings.data.size, settings.data.channels)
        origin = find_origin(settings.init, RunFolder(settings.run_dir), settings.model.heads)
        if origin is not None:
            weights = origin.weights(model.grid, settings.model.patch, settings.data.channels)
            load_autoencoder(model, weights, origin.path)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups: with and without weight decay."""
        return parameter_groups(model, self.settings.optim.weight_decay)

    def batches(self, plan: BatchPlan, rank: int) -> TrainingBatches:
        """Return the batches of one rank, with noise for the masks."""
        settings = self.settings
        recipe = BatchRecipe(settings.seed, settings.data, settings.augment, self.noise_columns)
        return self.source.train_batches(plan, rank, recipe)

    def loss_of(self, images: int) -> LossOf:
        """Return the reconstruction loss of the hidden patches; any number of images is allowed."""
        statistics = statistics_of(self.settings.data)

        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            loss: Tensor = model(normalize(batch.images, statistics), batch.noise).loss
            return loss

        return loss_of
