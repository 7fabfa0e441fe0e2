"""Task: what a run learns; used by the loop, the micro-batch search and the doctor."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data.batch import Batch, TrainingBatches
from mae.data.plan import BatchPlan
from mae.data.source import Source
from mae.models.description import ModelDescription
from mae.training.muon import divide_groups
from mae.training.optimizer import build_optimizer
from mae.training.settings import TrainSettings

LossOf = Callable[[nn.Module, Batch], Tensor]
"""Loss of one micro-batch on the device, a float32 scalar."""


class Task(ABC):
    """Model, loss and batches of a run."""

    settings: TrainSettings
    """Settings of the run, with mean and std filled in."""
    source: Source
    """Training data."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Number of images of which a micro-batch must hold a multiple."""

    @property
    @abstractmethod
    def noise_columns(self) -> int:
        """Number of random numbers per image that the loss reads from `Batch.noise`."""

    @property
    @abstractmethod
    def flops_per_image(self) -> int:
        """Number of floating-point operations to train on one image, forward and backward."""

    @property
    @abstractmethod
    def description(self) -> ModelDescription:
        """Description of the model, stored with its weights."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the model with its starting weights."""

    @abstractmethod
    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the groups of parameters by learning rate and weight decay."""

    def build_optimizer(self, model: nn.Module, device: torch.device) -> Optimizer:
        """Return the optimiser of the settings for a model that is not wrapped yet."""
        optim, groups = self.settings.optim, self.parameter_groups(model)
        return build_optimizer(divide_groups(groups, model) if optim.name == "muon" else groups, optim, device)

    @abstractmethod
    def batches(self, plan: BatchPlan, rank: int) -> TrainingBatches:
        """Return the training batches of one rank."""

    @abstractmethod
    def loss_of(self, images: int) -> LossOf:
        """Return the loss of micro-batches of `images` images.

        Raises:
            UserError: if the loss cannot be computed for this number.
        """
