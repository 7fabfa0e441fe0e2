"""Task: what a run learns, as the loop, the micro-batch search and the doctor see it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mae.data.batch import Batch, TrainingBatches
from mae.data.plan import BatchPlan
from mae.data.source import Source
from mae.models.description import ModelDescription
from mae.training.settings import TrainSettings

LossOf = Callable[[nn.Module, Batch], Tensor]
"""Loss of one micro-batch on the device, a float32 scalar."""


class Task(ABC):
    """A model, its loss, and the batches it learns from."""

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
        """Random numbers per image that the loss reads from `Batch.noise`."""

    @property
    @abstractmethod
    def flops_per_image(self) -> int:
        """Floating-point operations of training on one image, forward and backward."""

    @property
    @abstractmethod
    def description(self) -> ModelDescription:
        """Description of the model, stored with its weights."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the model with its starting weights."""

    @abstractmethod
    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the groups that the optimiser gets."""

    @abstractmethod
    def batches(self, plan: BatchPlan, rank: int) -> TrainingBatches:
        """Return the training batches of one rank."""

    @abstractmethod
    def loss_of(self, images: int) -> LossOf:
        """Return the loss of micro-batches of `images` images.

        Raises:
            UserError: if the loss cannot be computed for that many.
        """
