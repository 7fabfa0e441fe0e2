"""Batches: which samples each process takes at each step, and how a worker makes them.

One item is one whole micro-batch, addressed by its number alone, so the number of workers cannot change anything but
speed, and resuming is starting at another number.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mae import keyed
from mae.data.images.augment import NUMBERS_PER_SAMPLE, AugmentSettings, TrainViews, eval_view, pixels_to_keep
from mae.data.images.decode import decode_pixels
from mae.data.images.device import Encoded, EncodedImages
from mae.data.index import ShardIndex
from mae.data.order import Order
from mae.data.reader import ImageReader, Location
from mae.data.scan import NO_LABEL
from mae.data.settings import DataSettings
from mae.data.store.shards import Shard
from mae.errors import BadImageError, UserError
from mae.keyed import Purpose

# Micro-batches whose order is remembered: those that are read ahead.
_PLANNED_AT_MOST = 32


class Batch(NamedTuple):
    """One micro-batch of one process."""

    images: UInt8[Tensor, "batch channels height width"]
    labels: Int64[Tensor, " batch"]
    ids: Int64[Tensor, " batch"]
    """Sample ids."""
    noise: Float32[Tensor, "batch patches"]
    """Keyed uniform noise whose order decides the mask; no columns outside pretraining."""
    bad: list[str]
    """Images that could not be read or decoded, with shard, key and reason. As many as `data.max_bad_samples` in a run
    are replaced by their neighbours; with one more the run ends before anything learned from it is kept."""
    encoded: Encoded | None
    """Images that are still black in `images`, for the device to decode."""
    lost: str
    """Why data cannot be read any more, or is no longer what was indexed; the run ends as for bad images."""


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt out: `accumulation` micro-batches of `per_process` on each process."""

    global_batch: int
    processes: int
    per_process: int
    accumulation: int

    def positions(self, micro_step: int, rank: int) -> tuple[int, int]:
        """First position of the endless sample stream, and the one after the last, of a rank's micro-batch.

        A rank takes consecutive rows of each global batch, and so the samples of as few lanes as can be.
        """
        step, micro = divmod(micro_step, self.accumulation)
        start = step * self.global_batch + (rank * self.accumulation + micro) * self.per_process
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


def require_whole_images(plan: BatchPlan, data: DataSettings) -> None:
    """Raise a `UserError` if a micro-batch would hold some views of an image and not the others."""
    if plan.per_process % data.views_per_image:
        raise UserError(
            f"a process takes {plan.per_process} samples at a time, which are no whole number of images with "
            f"{data.views_per_image} views each (data.views_per_image); change batch_size or micro_batch_size"
        )


class Images:
    """Sample id -> image; decoded ones are kept where the settings say so."""

    def __init__(self, index: ShardIndex, data: DataSettings) -> None:
        self.reader = ImageReader(index, data.cache, data.cache_bytes, data.chunk_samples)
        self._data = data
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def get(self, place: Location) -> bytes | NDArray[np.uint8]:
        """The image, encoded, or decoded and kept, [height width channels].

        Raises:
            UserError: if its data are lost.
            BadImageError: if it is to be kept and cannot be decoded.
        """
        if place.sample_id in self._kept:
            return self._kept[place.sample_id]
        data = self.reader.read(place)
        if self._data.keep_decoded:
            pixels = pixels_to_keep(data, self._data.channels, self._data.size)
            if pixels is not None:
                self._kept[place.sample_id] = pixels
                return pixels
        return data

    def pixels(self, place: Location) -> NDArray[np.uint8]:
        """The whole decoded image, [height width channels]; raises as `get`."""
        image = self.get(place)
        return decode_pixels(image, self._data.channels) if isinstance(image, bytes) else image

    def named(self, place: Location, error: Exception) -> str:
        """`shard: key.jpg (reason)`."""
        return f"{self.reader.name(place.sample_id)} ({error})"


class _Image(NamedTuple):
    """An image of a micro-batch."""

    number: int
    """In the micro-batch."""
    place: int
    """In the subset."""
    location: Location


class _Draws(NamedTuple):
    """Random numbers of the rows of a micro-batch, for `TrainViews`."""

    numbers: NDArray[np.float64]
    words: list[int]


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
        self.index, self.images = index, Images(index, data)
        self.plan, self.rank, self.seed = plan, rank, seed
        self.data, self.augmentation, self.patches = data, augmentation, patches
        self.subset = subset
        self.views = data.views_per_image
        self._check()
        self.order = Order(
            seed, self.samples, plan.global_batch // self.views, data.chunk_samples, data.window_chunks, data.lanes
        )
        self._check_cache()
        self._planned: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._lost = ""

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return len(self.index) if self.subset is None else len(self.subset)

    @property
    def fingerprint(self) -> str:
        """Of all that the index holds."""
        return self.index.fingerprint

    @property
    def shards(self) -> list[Shard]:
        """Where the data lie."""
        return [entry.shard for entry in self.index.entries]

    def starting_at(self, micro_step: int) -> Dataset[Batch]:
        """For a run that goes on at `micro_step`: any micro-batch can be had at any time."""
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_threads": None}

    def __getitem__(self, micro_step: int) -> Batch:
        places, epochs = self._images_of(micro_step)
        ids = self._ids(places)
        batch = _batch_of(self.index, ids.repeat(self.views), self.data, self.patches)
        draws = self._draw(batch, ids, epochs)
        if not self._lost:
            try:
                images = list(map(_Image, count(), places.tolist(), self.images.reader.locate(ids)))
                batch = self._make(batch, draws, images)
                self._read_ahead(micro_step)
            except UserError as error:
                self._lost = str(error)
        # After a loss, what follows would wait in vain for a store that is gone: the trainer is to stop soon.
        return batch._replace(lost=self._lost)

    def _make(self, batch: Batch, draws: _Draws, images: Sequence[_Image]) -> Batch:
        """Read, decode and cut the images of a batch, over threads where there are any."""
        if self.images.reader.is_remote:
            self.images.reader.will_need(batch.ids[:: self.views].numpy())
        if self.data.decode_on == "device":
            encoded = EncodedImages(self.data.channels, self.augmentation)
            images = [image for image in images if not self._encode(encoded, image, draws)]
            batch = batch._replace(encoded=encoded.collected())
        share = max(1, math.ceil(len(images) / self._tasks))
        parts = [images[i : i + share] for i in range(0, len(images), share)]
        for bad in self._map(partial(self._fill, batch, draws), parts):
            batch.bad.extend(bad)
        return batch

    def _rows(self, image: _Image) -> range:
        return range(image.number * self.views, (image.number + 1) * self.views)

    def _encode(self, encoded: EncodedImages, image: _Image, draws: _Draws) -> bool:
        """Leave an image to the device; False for one that it cannot decode, or that is bad."""
        rows = self._rows(image)
        try:
            return encoded.add(self.images.reader.read(image.location), rows, draws.numbers[rows.start : rows.stop])
        except BadImageError:
            return False  # met again, and named, by the processor
        except UserError as error:
            raise UserError(self.images.named(image.location, error)) from None

    def _images_of(self, micro_step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in the subset, and epochs, of the images of a micro-batch; asked for twice, ahead and in time."""
        if micro_step not in self._planned:
            while len(self._planned) >= _PLANNED_AT_MOST:
                del self._planned[next(iter(self._planned))]
            start, stop = self.plan.positions(micro_step, self.rank)
            self._planned[micro_step] = self.order.at(start // self.views, stop // self.views)
        return self._planned[micro_step]

    def _ids(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return places if self.subset is None else self.subset[places]

    def _read_ahead(self, micro_step: int) -> None:
        """Have the images of later batches brought near; those that are kept were needed once only."""
        if not self.data.keep_decoded:
            for steps in self.images.reader.steps_ahead(self.order.horizon // self.order.batch):
                places, _ = self._images_of(micro_step + steps * self.plan.accumulation)
                self.images.reader.will_need(self._ids(places))

    def _draw(self, batch: Batch, ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> _Draws:
        """Mask noise into `batch`, and the other random numbers of its rows.

        Every random number is keyed by (seed, epoch, sample id) and counted through the views.
        """
        numbers = np.empty((len(ids), self.views * NUMBERS_PER_SAMPLE))
        words = np.empty((len(ids), self.views), dtype=np.uint64)
        noise = batch.noise.view(len(ids), self.views * self.patches).numpy()
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            crop, masks, word = (
                keyed.key(purpose, self.seed, epoch) for purpose in (Purpose.CROP, Purpose.MASK, Purpose.AUGMENT)
            )
            numbers[rows] = keyed.uniform(crop, ids[rows], numbers.shape[1])
            noise[rows] = keyed.uniform_float32(masks, ids[rows], noise.shape[1])
            words[rows] = keyed.bits(word, ids[rows], self.views)
        return _Draws(numbers.reshape(-1, NUMBERS_PER_SAMPLE), words.ravel().tolist())

    def _fill(self, batch: Batch, draws: _Draws, images: Sequence[_Image]) -> list[str]:
        """Decode and cut some images; names the bad ones."""
        views = TrainViews(batch.images, draws.numbers, self.augmentation, draws.words)
        bad: list[str] = []
        for image in images:
            rows = self._rows(image)
            if not self._add(views, image.location, rows, bad):
                batch.labels[rows.start : rows.stop] = self._substitute(views, image, rows, bad)
        views.finish()
        return bad

    def _add(self, views: TrainViews, location: Location, rows: Sequence[int], bad: list[str]) -> bool:
        """Cut these rows out of the image at `location`; names it if it is bad.

        Raises:
            UserError: if its data are lost.
        """
        try:
            views.add(self.images.get(location), rows)
        except BadImageError as error:
            bad.append(self.images.named(location, error))
            return False
        except UserError as error:
            raise UserError(self.images.named(location, error)) from None
        return True

    def _substitute(self, views: TrainViews, image: _Image, rows: Sequence[int], bad: list[str]) -> int:
        """Cut the rows of a bad image out of the next good one of the set, and return its label.

        The rule knows nothing of workers or processes. If as many neighbours are bad as are allowed in all, the rows
        stay black under their own label, and the run stops before anything learned from them is kept.
        """
        for distance in range(1, min(self.data.max_bad_samples + 1, self.samples)):
            (location,) = self.images.reader.locate(self._ids(np.array([(image.place + distance) % self.samples])))
            if self._add(views, location, rows, bad):
                return int(self.index.label[location.sample_id])
        if self.data.max_bad_samples >= self.samples:
            raise UserError(f"all {self.samples} images are bad, the first: {bad[0]}")
        return int(self.index.label[image.location.sample_id])

    @property
    def _tasks(self) -> int:
        """Parts of a batch: more than threads, so that none waits long for the slowest."""
        return 1 if self.data.threads == 1 else 4 * self.data.threads

    def _map(
        self, work: Callable[[Sequence[_Image]], list[str]], parts: Sequence[Sequence[_Image]]
    ) -> Iterator[list[str]]:
        """Do the parts in order, over threads where there are any. The trainer's own process starts none: they would
        change its number of arithmetic threads, and with that its bits."""
        if self.data.threads == 1 or get_worker_info() is None:
            return map(work, parts)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.data.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self._threads.map(work, parts)

    def _check_cache(self) -> None:
        """Refuse a cache that would drop what was fetched ahead before it is used.

        The ranks of a node, which torchrun and Accelerate count, share one and read their own lanes only.
        """
        remote = sum(entry.shard.size for entry in self.index.entries if entry.shard.is_remote)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.plan.processes))
        kept = remote * min(1.0, 2 * self.order.horizon / self.samples) * ranks_here / self.plan.processes
        if kept > self.data.cache_bytes:
            raise UserError(
                f"data.cache_bytes is {self.data.cache_bytes:.3g}, but this order keeps two windows, {kept:.3g} bytes, "
                "of the remote shards at hand; give it more, or lower data.lanes or data.window_chunks"
            )

    def _check(self) -> None:
        plan, data = self.plan, self.data
        if self.samples < plan.global_batch:
            raise UserError(
                f"batch_size is {plan.global_batch} but the data holds {self.samples} samples; "
                f"allowed: 1 to {self.samples}"
            )
        require_whole_images(plan, data)
        if self.augmentation.rand_augment and data.decode_on == "device":
            raise UserError("augment.rand_augment needs the decoded image in the worker; set data.decode_on to cpu")
        if self.augmentation.rand_augment and data.channels not in (1, 3):
            raise UserError(
                f"augment.rand_augment is {self.augmentation.rand_augment} but the images have {data.channels} "
                "channels; it knows gray and RGB only: set it to 0"
            )


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
        self.index, self.images, self.data = index, Images(index, data), data
        everyone = np.arange(len(index)) if ids is None else ids
        self.total = len(everyone)
        mine = everyone[rank::processes]
        self.chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Batch:
        ids = self.chunks[number]
        batch = _batch_of(self.index, ids, self.data, patches=0)
        for row, location in enumerate(self.images.reader.locate(ids)):
            try:
                pixels = torch.from_numpy(np.ascontiguousarray(self.images.pixels(location))).permute(2, 0, 1)
                batch.images[row] = eval_view(pixels, self.data.size, self.data.crop_pct)
            except (BadImageError, UserError) as error:
                batch.bad.append(self.images.named(location, error))
        return batch


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


def empty_batch(rows: int, data: DataSettings, patches: int) -> Batch:
    """A batch of black images without labels and ids, both -1."""
    height, width = data.size
    return Batch(
        # Channels last, as decoders write them; on the device this is the faster order as well.
        images=torch.zeros(rows, height, width, data.channels, dtype=torch.uint8).permute(0, 3, 1, 2),
        labels=torch.full((rows,), NO_LABEL),
        ids=torch.full((rows,), -1),
        noise=torch.zeros(rows, patches),
        bad=[],
        encoded=None,
        lost="",
    )


def _batch_of(index: ShardIndex, ids: NDArray[np.int64], data: DataSettings, patches: int) -> Batch:
    """A batch of black images with the labels and ids of these samples."""
    labels = torch.from_numpy(index.label[ids])
    return empty_batch(len(ids), data, patches)._replace(labels=labels, ids=torch.from_numpy(ids.copy()))
