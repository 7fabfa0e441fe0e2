"""Source of training data: indexed shards, in which any sample can be read, or a stream of shards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from mae.data.batch import BatchRecipe, TrainingBatches
from mae.data.eval_batches import EvalBatches
from mae.data.images.augment import eval_view
from mae.data.images.decode import decode
from mae.data.index import ShardIndex
from mae.data.measuring import measure
from mae.data.plan import BatchPlan
from mae.data.prepare import open_shards
from mae.data.sample_images import NamedImage, spread_images
from mae.data.settings import DataSettings
from mae.data.spread import spread_evenly
from mae.data.statistics import PixelStatistics, for_channels, stored_statistics
from mae.data.store.shards import Shard, expand
from mae.data.stream import PROMISES, StreamBatches, StreamSample, read_samples
from mae.data.train_batches import TrainBatches
from mae.errors import BadImageError, UserError


class FixedImages(NamedTuple):
    """Few images for pictures, the same in every start of a run."""

    ids: NDArray[np.int64]
    """Numbers that key the masks of these images, one per image."""
    pixels: UInt8[Tensor, "images channels height width"]


class Source(ABC):
    """Training data, indexed or streamed."""

    shards: list[Shard]
    """Shards that hold the data."""
    samples: int
    """Number of samples in an epoch."""

    @abstractmethod
    def train_batches(self, plan: BatchPlan, rank: int, recipe: BatchRecipe) -> TrainingBatches:
        """Return the training batches of one rank."""

    @abstractmethod
    def with_statistics(self, data: DataSettings, say: Callable[[str], None]) -> DataSettings:
        """Return `data` with mean and std: those that are set, else those stored with the shards, else measured ones.

        Raises:
            UserError: if they are not set and cannot be found.
        """

    @abstractmethod
    def fixed_images(self, most: int, data: DataSettings) -> FixedImages:
        """Return at most `most` images, cropped as in evaluation.

        Raises:
            UserError: if an indexed image is bad and `data.max_bad_samples` is 0, or all images of a stream are bad.
        """

    @abstractmethod
    def some_images(self, most: int, data: DataSettings) -> Iterator[NamedImage]:
        """Yield at most `most` encoded images, for an inspection of the data."""


@dataclass(frozen=True)
class IndexedSource(Source):
    """Shards with an index."""

    index: ShardIndex

    @property
    def shards(self) -> list[Shard]:  # type: ignore[override]  # read only
        """Shards that hold the data."""
        return [entry.shard for entry in self.index.entries]

    @property
    def samples(self) -> int:  # type: ignore[override]  # read only
        """Number of samples in an epoch."""
        return len(self.index)

    def train_batches(
        self, plan: BatchPlan, rank: int, recipe: BatchRecipe, subset: NDArray[np.int64] | None = None
    ) -> TrainBatches:
        """Return the training batches of one rank, from all samples or from a subset of sample ids."""
        return TrainBatches(self.index, plan, rank, recipe, subset)

    def with_statistics(self, data: DataSettings, say: Callable[[str], None]) -> DataSettings:
        """Return `data` with mean and std filled in; see `Source`."""
        if data.mean is not None:
            return data
        index = self.index
        found, images = None, len(index)
        if data.value_range is None:  # stored statistics do not count images of more than 8 bits
            lengths = {entry.shard.name: entry.samples for entry in index.entries}
            found = stored_statistics(self.shards, data.channels, lengths)
            if found is None and index.pixels is not None:
                found, images = for_channels(index.pixels, data.channels), index.pixels_of
        if found is None:
            found, images = measure(index, data.cache, data.cache_bytes, data.channels, data.value_range)
        if found is None:
            raise UserError(
                f"no image could be decoded into {data.channels} channels (data.channels) to measure mean and std; "
                "set the number of channels that the images have"
            )
        if images < len(index):
            say(
                f"mean and std were measured on {images:,} of {len(index):,} images ({found}); "
                "`mae pack` and `mae index --check` measure all"
            )
        return replace(data, mean=found.mean, std=found.std)

    def fixed_images(self, most: int, data: DataSettings) -> FixedImages:
        """Return images spread evenly over the data; see `Source`."""
        ids = spread_evenly(self.samples, most)
        batch = EvalBatches(self.index, len(ids), data, ids=ids)[0]
        if batch.bad and not data.max_bad_samples:
            raise UserError(f"bad image {batch.bad[0]}; mend it, or pack the shards again without it")
        return FixedImages(ids, batch.images)

    def some_images(self, most: int, data: DataSettings) -> Iterator[NamedImage]:
        """Yield images spread evenly over all shards."""
        return spread_images(self.index, most, data)


@dataclass(frozen=True)
class StreamedSource(Source):
    """Shards that can only be read from front to back."""

    shards: list[Shard]
    samples: int
    """Number of samples that count as an epoch."""

    def train_batches(self, plan: BatchPlan, rank: int, recipe: BatchRecipe) -> StreamBatches:
        """Return the training batches of one rank."""
        return StreamBatches(self.shards, plan, rank, recipe)

    def with_statistics(self, data: DataSettings, say: Callable[[str], None]) -> DataSettings:
        """Return `data` with mean and std filled in; see `Source`. A stream is not measured."""
        if data.mean is not None:
            return data
        found = stored_statistics(self.shards, data.channels)
        if found is None:
            raise UserError("data.mean and data.std are not set, and a stream cannot measure them; set both")
        return replace(data, mean=found.mean, std=found.std)

    def fixed_images(self, most: int, data: DataSettings) -> FixedImages:
        """Return the first good images of the first shard; see `Source`."""
        found: list[Tensor] = []
        reason = ""
        for sample in self._first_samples(data):
            try:
                found.append(eval_view(decode(sample.image, data.channels, data.value_range), data.size, data.crop_pct))
            except BadImageError as error:
                reason = f"; the last: {sample.name} ({error})"
            if len(found) == most:
                break
        if not found:
            raise UserError(f"shard {self.shards[0]} has no good image{reason}; pack the shards again without bad ones")
        return FixedImages(np.arange(len(found)), torch.stack(found))

    def some_images(self, most: int, data: DataSettings) -> Iterator[NamedImage]:
        """Yield the first images of the first shard that has any: a stream cannot jump."""
        for sample in islice(self._first_samples(data), most):
            yield sample.name, sample.image

    def _first_samples(self, data: DataSettings) -> Iterator[StreamSample]:
        """Yield the samples of the first shard that has any."""
        for shard in self.shards:
            stream = read_samples(shard, data.cache, data.rules)
            if (first := next(stream, None)) is not None:
                yield first
                yield from stream
                return


def open_source(data: DataSettings, say: Callable[[str], None]) -> IndexedSource | StreamedSource:
    """Open the training shards as `data.reader` says, and make their index if it is missing.

    Raises:
        UserError: if shards are missing or damaged, or for a reason of `open_shards`.
    """
    if data.reader == "stream":
        assert data.stream_samples is not None  # checked with the settings
        say(PROMISES)
        return StreamedSource(expand(data.shards), data.stream_samples)
    return IndexedSource(open_shards(data.shards, data, say))


def statistics_of(data: DataSettings) -> PixelStatistics:
    """Return the mean and std of data settings in which `Source.with_statistics` has filled them in."""
    assert data.mean is not None
    assert data.std is not None
    return PixelStatistics(data.mean, data.std)
