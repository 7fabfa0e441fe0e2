"""One micro-batch, and what every source of training batches offers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mae.data.images.augment import AugmentSettings
from mae.data.images.device import Encoded, decode_into
from mae.data.images.rand_augment import NONE
from mae.data.plan import BatchPlan
from mae.data.scan import NO_LABEL
from mae.data.settings import DataSettings
from mae.data.store.shards import Shard
from mae.errors import UserError


class Batch(NamedTuple):
    """One micro-batch of one process."""

    images: UInt8[Tensor, "batch channels height width"]
    labels: Int64[Tensor, " batch"]
    ids: Int64[Tensor, " batch"]
    """Sample ids."""
    noise: Float32[Tensor, "batch noise_columns"]
    """Uniform random numbers from 0 to 1, keyed by sample and epoch; pretraining makes its masks from them."""
    words: list[int]
    """Random 64-bit word of each image, keyed by sample and epoch, by which `erase` draws; empty: nothing is erased."""
    bad: list[str]
    """Images that could not be read or decoded, with shard, key and reason. Up to `data.max_bad_samples` in a run are
    replaced by their neighbours; one more stops the run before it saves anything learned from this batch."""
    encoded: Encoded | None
    """Images for the device to decode; they are still black in `images`."""
    lost: str
    """Reason why data cannot be read any more, or differ from the index; it stops the run as `bad` does. Else empty."""


@dataclass(frozen=True)
class BatchRecipe:
    """Rules by which samples become rows of a training batch."""

    seed: int
    """Key of the order, the crops and all other random numbers."""
    data: DataSettings
    augment: AugmentSettings
    noise_columns: int = 0
    """Number of random numbers per row that the task needs in `Batch.noise`."""

    def __post_init__(self) -> None:
        name, channels = self.augment.rand_augment, self.data.channels
        if name != NONE and self.data.decode_on == "device":
            raise UserError("augment.rand_augment needs the decoded image in the worker; set data.decode_on to cpu")
        if name != NONE and channels not in (1, 3):
            raise UserError(
                f"augment.rand_augment is {name} but the images have {channels} channels; it supports gray and RGB "
                f"only: set it to {NONE}"
            )


class TrainingBatches(ABC):
    """Micro-batches of one process, from indexed shards or from a stream."""

    plan: BatchPlan
    recipe: BatchRecipe

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of samples in an epoch."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes with the data."""

    @property
    @abstractmethod
    def shards(self) -> list[Shard]:
        """Shards that hold the data."""

    @abstractmethod
    def starting_at(self, micro_step: int) -> Dataset[Batch]:
        """Return the dataset for a run that starts or resumes at `micro_step`."""


def empty_batch(rows: int, data: DataSettings, noise_columns: int) -> Batch:
    """Return a batch of black images; labels and ids are -1."""
    height, width = data.size
    return Batch(
        # Channels last: decoders write this order, and it is also the faster one on the device.
        images=torch.zeros(rows, height, width, data.channels, dtype=torch.uint8).permute(0, 3, 1, 2),
        labels=torch.full((rows,), NO_LABEL),
        ids=torch.full((rows,), -1),
        noise=torch.zeros(rows, noise_columns),
        words=[],
        bad=[],
        encoded=None,
        lost="",
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a batch to the device, and decode the images that were left to it.

    Copies from pinned memory run while the device computes.

    Raises:
        UserError: if the device cannot decode an image.
    """
    images = batch.images.to(device, non_blocking=True)
    if batch.encoded is not None:
        decode_into(images, batch.encoded, batch.ids)
    return batch._replace(
        images=images,
        labels=batch.labels.to(device, non_blocking=True),
        noise=batch.noise.to(device, non_blocking=True),
    )
