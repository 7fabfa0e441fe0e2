"""Batches: which samples each process takes at each step, and the workers that make them.

One item of a loader is one whole micro-batch, made inside a worker and addressed by its number alone, so
the number of workers cannot change anything but speed, and resuming is starting at another number.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae import keyed
from mae.data import augment
from mae.data.augment import AugmentSettings
from mae.data.decode import decode
from mae.data.index import ImageReader, ShardIndex
from mae.data.order import sample_ids
from mae.data.statistics import PixelStatistics
from mae.errors import BadImageError, UserError
from mae.keyed import Purpose
from mae.settings import check

_SECONDS_WITHOUT_A_BATCH = 600


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they reach the model."""

    shards: tuple[str, ...] = ()
    """Tar shards to train on: paths, globs, braces or folders; .tar.gz is unpacked into the cache."""
    workers: int = 4
    """Processes per rank that decode images; 0 decodes in the training process. Changes speed only."""
    image_size: tuple[int, ...] = (224,)
    """Height and width [pixels] of the images the model sees; one number for a square."""
    channels: int = 3
    """1 gray, 3 RGB, 4 RGBA, or any number that .npy images have."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel on a scale of 0..1; None: what `mae pack` stored, else measured at the start."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel on a scale of 0..1; None: as for mean."""
    crop_pct: float = 0.875
    """Evaluation resizes so that the central crop is this share of the image's side (timm's crop_pct)."""
    keep_decoded: bool = False
    """Keep every decoded image in the memory of each worker; for sets of a few hundred megabytes of pixels."""
    cache_dir: Path | None = None
    """Where gzipped shards are unpacked; None: $XDG_CACHE_HOME/mae or ~/.cache/mae."""

    def __post_init__(self) -> None:
        check(self.workers >= 0, "data.workers", self.workers, "0 or more")
        check(
            len(self.image_size) in (1, 2) and min(self.image_size) >= 1,
            "data.image_size",
            self.image_size,
            "one number, or height and width, each at least 1 pixel",
        )
        check(self.channels >= 1, "data.channels", self.channels, "1 or more")
        check(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "above 0, at most 1")
        check((self.mean is None) == (self.std is None), "data.mean", self.mean, "mean and std set together")
        for name, values in (("data.mean", self.mean), ("data.std", self.std)):
            if values is not None:
                check(len(values) == self.channels, name, values, f"{self.channels} numbers (data.channels)")
                check(all(0 <= v <= 1 for v in values), name, values, "numbers from 0 to 1")
        check(self.std is None or min(self.std) > 0, "data.std", self.std, "numbers above 0")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size[0], self.image_size[-1]


class Batch(NamedTuple):
    """One micro-batch of one process."""

    images: UInt8[Tensor, "batch channels height width"]
    labels: Int64[Tensor, " batch"]
    ids: Int64[Tensor, " batch"]
    """Sample ids."""
    noise: Float32[Tensor, "batch patches"]
    """Keyed uniform noise whose order decides the mask; no columns outside pretraining."""
    bad: list[str]
    """Images that could not be decoded, with shard, key and reason; they are black in `images`, and the
    run ends before anything learned from them is kept."""


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt out: `accumulation` micro-batches of `per_process` on each process."""

    global_batch: int
    processes: int
    per_process: int
    accumulation: int

    def positions(self, micro_step: int, rank: int) -> tuple[int, int]:
        """First position of the endless sample stream, and the one after the last, of a rank's micro-batch."""
        start = (micro_step * self.processes + rank) * self.per_process
        return start, start + self.per_process


def plan_batches(global_batch: int, processes: int, micro_batch: int | None) -> BatchPlan:
    """Deal `global_batch` samples to `processes`, at most `micro_batch` at a time on each.

    Raises:
        UserError: if the numbers do not divide, naming the nearest global batches that do.
    """
    is_limited = micro_batch is not None and micro_batch * processes < global_batch
    unit = processes * micro_batch if is_limited and micro_batch else processes
    if global_batch % unit:
        below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
        raise UserError(
            f"batch_size {global_batch} cannot be dealt to {processes} processes"
            + (f" in micro-batches of {micro_batch}" if is_limited else "")
            + f"; nearest that can: {f'{below} or ' if below else ''}{above}"
        )
    accumulation = global_batch // unit if is_limited else 1
    return BatchPlan(global_batch, processes, global_batch // (processes * accumulation), accumulation)


class ImageDecoder:
    """Sample id -> decoded image; what is bad is named, and given back as None."""

    def __init__(self, index: ShardIndex, data: DataSettings) -> None:
        self.index = index
        self._reader, self._channels = ImageReader(index), data.channels
        self._kept: dict[int, Tensor] | None = {} if data.keep_decoded else None

    def decode(self, sample_id: int, bad: list[str]) -> UInt8[Tensor, "channels height width"] | None:
        """The image, or None with its name and what is wrong with it added to `bad`."""
        if self._kept is not None and sample_id in self._kept:
            return self._kept[sample_id]
        try:
            image = decode(self._reader.read(sample_id), self._channels)
        except BadImageError as error:
            bad.append(f"{self.index.name(sample_id)} ({error})")
            return None
        if self._kept is not None:
            self._kept[sample_id] = image
        return image


class TrainBatches(Dataset[Batch]):
    """Micro-batch number -> augmented images, in the exact order of `mae.data.order`."""

    def __init__(
        self,
        index: ShardIndex,
        plan: BatchPlan,
        rank: int,
        seed: int,
        data: DataSettings,
        augmentation: AugmentSettings,
        patches: int = 0,
        subset: NDArray[np.int64] | None = None,
    ) -> None:
        self.images = ImageDecoder(index, data)
        self.plan, self.rank, self.seed = plan, rank, seed
        self.data, self.augmentation, self.patches = data, augmentation, patches
        self.subset = np.arange(len(index)) if subset is None else subset
        if len(self.subset) < plan.global_batch:
            raise UserError(
                f"batch_size is {plan.global_batch} but the data holds {len(self.subset)} samples; "
                f"allowed: 1 to {len(self.subset)}"
            )
        if augmentation.rand_augment and data.channels not in (1, 3):
            raise UserError(
                f"augment.rand_augment is {augmentation.rand_augment} but the images have {data.channels} channels; "
                "it knows gray and RGB only: set it to 0"
            )

    def __getitem__(self, micro_step: int) -> Batch:
        places, epochs = sample_ids(self.seed, len(self.subset), *self.plan.positions(micro_step, self.rank))
        ids = self.subset[places]
        batch = _empty_batch(self.images.index, ids, self.data, self.patches)
        for epoch in np.unique(epochs).tolist():
            self._fill(batch, np.flatnonzero(epochs == epoch), ids, epoch)
        return batch

    def _fill(self, batch: Batch, rows: NDArray[np.int64], ids: NDArray[np.int64], epoch: int) -> None:
        """Make the rows that belong to one epoch; every random number is keyed by (seed, epoch, id)."""
        chosen = ids[rows]
        numbers = keyed.uniform(keyed.key(Purpose.CROP, self.seed, epoch), chosen, augment.NUMBERS_PER_SAMPLE).tolist()
        words = keyed.bits(keyed.key(Purpose.AUGMENT, self.seed, epoch), chosen, 1)[:, 0].tolist()
        noise = keyed.uniform_float32(keyed.key(Purpose.MASK, self.seed, epoch), chosen, self.patches)
        batch.noise[rows] = torch.from_numpy(noise)
        # Without workers this is the trainer's own process, and drop path must find its generator as it was.
        with torch.random.fork_rng(devices=[], enabled=self.augmentation.rand_augment > 0):
            for row, sample_id, uniform, word in zip(rows.tolist(), chosen.tolist(), numbers, words, strict=True):
                image = self.images.decode(sample_id, batch.bad)
                if image is not None:
                    if self.augmentation.rand_augment:
                        augment.seed_augmentation(word)
                    batch.images[row] = augment.train_view(image, self.data.size, uniform, self.augmentation)


class EvalBatches(Dataset[Batch]):
    """Batch number -> centre crops; the ranks share the samples out, each exactly once, none padded."""

    def __init__(
        self,
        index: ShardIndex,
        batch_size: int,
        data: DataSettings,
        rank: int = 0,
        processes: int = 1,
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.images, self.data = ImageDecoder(index, data), data
        everyone = np.arange(len(index)) if ids is None else ids
        self.total = len(everyone)
        mine = everyone[rank::processes]
        self.chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Batch:
        ids = self.chunks[number]
        batch = _empty_batch(self.images.index, ids, self.data, patches=0)
        for row, sample_id in enumerate(ids.tolist()):
            image = self.images.decode(sample_id, batch.bad)
            if image is not None:
                batch.images[row] = augment.eval_view(image, self.data.size, self.data.crop_pct)
        return batch


def load(batches: Dataset[Batch], numbers: Sequence[int], workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """The batches of the given numbers, in that order, made ahead by `workers` processes."""
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batch_size it is given one item
            worker_init_fn=_leave_signals_to_the_trainer,
            timeout=_SECONDS_WITHOUT_A_BATCH if workers else 0,
        )
    )


def normalize(
    images: UInt8[Tensor, "batch channels height width"], statistics: PixelStatistics
) -> Float32[Tensor, "batch channels height width"]:
    """uint8 pixels -> float32 with the data's own mean and standard deviation, on the images' device."""
    mean = torch.tensor(statistics.mean, device=images.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(statistics.std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - mean) / std


def labelled_subset(index: ShardIndex, per_class: int, seed: int) -> NDArray[np.int64]:
    """`per_class` sample ids of each class, chosen by `seed`, in ascending order.

    Raises:
        UserError: if a class has fewer samples.
    """
    chosen = []
    for label in range(index.class_count()):
        members = np.flatnonzero(index.label == label)
        if len(members) < per_class:
            raise UserError(
                f"class {label} has {len(members)} samples, labels_per_class asks for {per_class}; "
                f"allowed: 1 to {len(members)}"
            )
        words = keyed.bits(keyed.key(Purpose.LABELS, seed), members, 1)[:, 0]
        chosen.append(members[np.argsort(words, kind="stable")[:per_class]])
    return np.sort(np.concatenate(chosen))


def _empty_batch(index: ShardIndex, ids: NDArray[np.int64], data: DataSettings, patches: int) -> Batch:
    return Batch(
        images=torch.zeros(len(ids), data.channels, *data.size, dtype=torch.uint8),
        labels=torch.from_numpy(index.label[ids]),
        ids=torch.from_numpy(ids.copy()),
        noise=torch.zeros(len(ids), patches),
        bad=[],
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches the whole process group; only the trainer decides what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
