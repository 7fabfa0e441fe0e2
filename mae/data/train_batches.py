"""Training batches from indexed shards: which samples each process takes at each step, and how a worker makes them.

The number of a micro-batch decides all that is in it. So the number of workers changes nothing but speed, and a run
resumes by starting at another number.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from mae import keyed
from mae.data.batch import Batch, BatchRecipe, TrainingBatches
from mae.data.eval_batches import labelled_batch
from mae.data.images.augment import NUMBERS_PER_SAMPLE, TrainViews
from mae.data.images.device import EncodedImages
from mae.data.index import ShardIndex
from mae.data.order import Order
from mae.data.plan import BatchPlan, require_whole_images
from mae.data.reader import Location
from mae.data.sample_images import SampleImages
from mae.data.store.shards import Shard
from mae.errors import BadImageError, UserError
from mae.keyed import Purpose

# Workers read ahead, so they need the order of a micro-batch twice; the last ones are kept.
_MAX_PLANNED = 32


class _Image(NamedTuple):
    """Image of a micro-batch."""

    number: int
    """Number in the micro-batch, from 0."""
    place: int
    """Position in the subset of samples to train on."""
    location: Location


class _Draws(NamedTuple):
    """Random numbers of the rows of a micro-batch, for `TrainViews`."""

    numbers: NDArray[np.float64]
    words: list[int]


class TrainBatches(Dataset[Batch], TrainingBatches):
    """Augmented images by micro-batch number, in the exact order of `mae.data.order`."""

    def __init__(
        self,
        index: ShardIndex,
        plan: BatchPlan,
        rank: int,
        recipe: BatchRecipe,
        subset: NDArray[np.int64] | None = None,
    ) -> None:
        self.index, self.plan, self.rank, self.recipe, self.subset = index, plan, rank, recipe, subset
        self.data, self.augment = recipe.data, recipe.augment
        self.images = SampleImages(index, self.data)
        self.views = self.data.views_per_image
        self._check()
        images, data = plan.global_batch // self.views, self.data
        self.order = Order(recipe.seed, self.samples, images, data.chunk_samples, data.window_chunks, data.lanes)
        self._check_cache()
        self._planned: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._lost = ""

    @property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return len(self.index) if self.subset is None else len(self.subset)

    @property
    def fingerprint(self) -> str:
        """Hash of the whole index."""
        return self.index.fingerprint

    @property
    def shards(self) -> list[Shard]:
        """Shards that hold the data."""
        return [entry.shard for entry in self.index.entries]

    def starting_at(self, micro_step: int) -> Dataset[Batch]:
        """Return this dataset: any micro-batch can be made at any time."""
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_threads": None}

    def __getitem__(self, micro_step: int) -> Batch:
        places, epochs = self._images_of(micro_step)
        ids = self._ids(places)
        batch = labelled_batch(self.index, ids.repeat(self.views), self.data, self.recipe.noise_columns)
        batch = batch._replace(words=self._words(Purpose.ERASE, ids, epochs) if self.augment.erase else [])
        draws = self._draw(batch, ids, epochs)
        if not self._lost:
            try:
                images = list(map(_Image, count(), places.tolist(), self.images.reader.locate(ids)))
                batch = self._make(batch, draws, images)
                self._read_ahead(micro_step)
            except UserError as error:
                self._lost = str(error)
        # After a loss, do not wait for a store that is gone, once per image: the trainer stops soon.
        return batch._replace(lost=self._lost)

    def _make(self, batch: Batch, draws: _Draws, images: Sequence[_Image]) -> Batch:
        """Read, decode and crop the images of a batch, with threads if there are any."""
        if self.images.reader.is_remote:
            self.images.reader.will_need(batch.ids[:: self.views].numpy())
        if self.data.decode_on == "device":
            encoded = EncodedImages(self.data.channels, self.augment)
            images = [image for image in images if not self._encode(encoded, image, draws)]
            batch = batch._replace(encoded=encoded.collected())
        # More parts than threads, so that no thread waits long for the slowest.
        share = max(1, math.ceil(len(images) / (1 if self.data.threads == 1 else 4 * self.data.threads)))
        parts = [images[i : i + share] for i in range(0, len(images), share)]
        for bad in self._map(partial(self._fill, batch, draws), parts):
            batch.bad.extend(bad)
        return batch

    def _rows(self, image: _Image) -> range:
        return range(image.number * self.views, (image.number + 1) * self.views)

    def _encode(self, encoded: EncodedImages, image: _Image, draws: _Draws) -> bool:
        """Leave an image to the device; return False if it is bad or the device cannot decode it."""
        rows = self._rows(image)
        try:
            return encoded.add(self.images.reader.read(image.location), rows, draws.numbers[rows.start : rows.stop])
        except BadImageError:
            return False  # the CPU will decode it again, and report it
        except UserError as error:
            raise UserError(self.images.named(image.location, error)) from None

    def _images_of(self, micro_step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return positions in the subset, and epochs, of the images of a micro-batch."""
        if micro_step not in self._planned:
            while len(self._planned) >= _MAX_PLANNED:
                del self._planned[next(iter(self._planned))]
            start, stop = self.plan.positions(micro_step, self.rank)
            self._planned[micro_step] = self.order.at(start // self.views, stop // self.views)
        return self._planned[micro_step]

    def _ids(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return places if self.subset is None else self.subset[places]

    def _read_ahead(self, micro_step: int) -> None:
        """Have the images of later batches fetched."""
        if not self.data.keep_decoded:  # kept images are read once
            for steps in self.images.reader.steps_ahead(self.order.horizon // self.order.batch):
                places, _ = self._images_of(micro_step + steps * self.plan.accumulation)
                self.images.reader.will_need(self._ids(places))

    def _draw(self, batch: Batch, ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> _Draws:
        """Write the noise of the masks into `batch`, and return the other random numbers of its rows.

        Every random number is keyed by seed, epoch and sample id, and numbered over the views of the image.
        """
        numbers = np.empty((len(ids), self.views * NUMBERS_PER_SAMPLE))
        noise = batch.noise.view(len(ids), self.views * self.recipe.noise_columns).numpy()
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            crop, masks = (keyed.key(purpose, self.recipe.seed, epoch) for purpose in (Purpose.CROP, Purpose.MASK))
            numbers[rows] = keyed.uniform(crop, ids[rows], numbers.shape[1])
            noise[rows] = keyed.uniform_float32(masks, ids[rows], noise.shape[1])
        return _Draws(numbers.reshape(-1, NUMBERS_PER_SAMPLE), self._words(Purpose.AUGMENT, ids, epochs))

    def _words(self, purpose: Purpose, ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> list[int]:
        """Return a random word for each row, keyed by seed, epoch and sample id, and numbered over the views."""
        words = np.empty((len(ids), self.views), dtype=np.uint64)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            words[rows] = keyed.bits(keyed.key(purpose, self.recipe.seed, epoch), ids[rows], self.views)
        found: list[int] = words.ravel().tolist()
        return found

    def _fill(self, batch: Batch, draws: _Draws, images: Sequence[_Image]) -> list[str]:
        """Decode and crop some images, and return the names of the bad ones."""
        views = TrainViews(
            batch.images, draws.numbers, self.augment, draws.words, self.data.value_range, self.data.mean
        )
        bad: list[str] = []
        for image in images:
            rows = self._rows(image)
            if not self._add(views, image.location, rows, bad):
                batch.labels[rows.start : rows.stop] = self._substitute(views, image, rows, bad)
        views.finish()
        return bad

    def _add(self, views: TrainViews, location: Location, rows: Sequence[int], bad: list[str]) -> bool:
        """Crop these rows from the image at `location`; if it is bad, add its name to `bad` and return False.

        Raises:
            UserError: if the image cannot be read, or differs from the index.
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
        """Crop the rows of a bad image from the next good one of the set, and return its label.

        The choice does not depend on workers or processes. If as many neighbours are bad as the whole run may have,
        the rows stay black with their own label, and the run stops before anything learned from them is saved.
        """
        for distance in range(1, min(self.data.max_bad_samples + 1, self.samples)):
            (location,) = self.images.reader.locate(self._ids(np.array([(image.place + distance) % self.samples])))
            if self._add(views, location, rows, bad):
                return int(self.index.label[location.sample_id])
        if self.data.max_bad_samples >= self.samples:
            raise UserError(f"all {self.samples} images are bad, the first: {bad[0]}")
        return int(self.index.label[image.location.sample_id])

    def _map(
        self, work: Callable[[Sequence[_Image]], list[str]], parts: Sequence[Sequence[_Image]]
    ) -> Iterator[list[str]]:
        """Yield the results of the parts in order, made by threads if there are any.

        The training process starts none: they would change its number of compute threads, and so the last bits.
        """
        if self.data.threads == 1 or get_worker_info() is None:
            return map(work, parts)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.data.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self._threads.map(work, parts)

    def _check_cache(self) -> None:
        """Raise a `UserError` if the cache would drop fetched data before it is used.

        The ranks of a node share one cache, and each reads its own lanes only.
        """
        remote = sum(entry.shard.size for entry in self.index.entries if entry.shard.is_remote)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.plan.processes))
        kept = remote * min(1.0, 2 * self.order.horizon / self.samples) * ranks_here / self.plan.processes
        if kept > self.data.cache_bytes:
            raise UserError(
                f"data.cache_bytes is {self.data.cache_bytes:.3g}, but this order keeps two windows of the remote "
                f"shards, {kept:.3g} bytes; raise it, or lower data.lanes or data.window_chunks"
            )

    def _check(self) -> None:
        plan, data = self.plan, self.data
        if self.samples < plan.global_batch:
            unit = plan.processes * data.views_per_image
            fits = self.samples // unit * unit
            remedy = (
                f"allowed: {unit} to {fits}, for example --batch_size {fits}"
                if fits
                else f"they must be {unit} at least (processes x views of an image): give more, or use fewer processes"
            )
            raise UserError(f"batch_size is {plan.global_batch} but the data have {self.samples} samples; {remedy}")
        require_whole_images(plan, data.views_per_image)
