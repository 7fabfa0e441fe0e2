"""Batches from shards that can only be read from front to back, by webdataset's own pipeline.

The promises are weaker than those of the indexed reader, and `PROMISES` says so to the user: shards are drawn at
random for ever, so an epoch is only a number of samples. What does hold: each tar is read whole and strictly before
any of it is used, nothing in it is ever run, and each process and worker draws its own share of the shards.
"""

import random
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mae import keyed
from mae.data.batches import Batch, BatchPlan, empty_batch, require_whole_images
from mae.data.images.augment import NUMBERS_PER_SAMPLE, AugmentSettings, TrainViews, eval_view
from mae.data.images.decode import decode
from mae.data.indexing import local_copy
from mae.data.scan import label_of, samples
from mae.data.settings import DataSettings
from mae.data.store.shards import Shard
from mae.data.tar import mapped, walk
from mae.errors import BadImageError, UserError
from mae.keyed import Purpose

PROMISES = (
    "data.reader is stream: shards are drawn at random with replacement, an epoch is data.stream_samples samples, "
    "images may repeat or be missing in it, and a resumed run goes on with other images; "
    "the indexed reader has none of these limits"
)


class StreamSample(NamedTuple):
    """One image as it comes out of a shard."""

    name: str
    """`shard: key.jpg`"""
    image: bytes
    label: int


class StreamBatches:
    """An endless stream of micro-batches; their rows have no sample ids, which are -1."""

    def __init__(
        self,
        shards: list[Shard],
        plan: BatchPlan,
        rank: int,
        seed: int,
        data: DataSettings,
        augmentation: AugmentSettings,
        patches: int = 0,
    ) -> None:
        self.shards, self.plan, self.rank, self.seed = shards, plan, rank, seed
        self.data, self.augmentation, self.patches = data, augmentation, patches
        require_whole_images(plan, data)

    @property
    def samples(self) -> int:
        """Samples that count as an epoch."""
        assert self.data.stream_samples is not None
        return self.data.stream_samples

    @property
    def fingerprint(self) -> str:
        """Of the names and sizes of the shards; what is in them is not known."""
        return sha256("".join(f"{shard.name}\0{shard.size}\0" for shard in self.shards).encode()).hexdigest()

    def starting_at(self, micro_step: int) -> Dataset[Batch]:
        """The stream for a run that goes on at `micro_step`: other draws than those before."""
        return _Stream(self, micro_step)

    def iterate(self, start: int, worker: int, workers: int) -> Iterator[Batch]:
        """The micro-batches that one of the workers of this process makes."""
        shares, share = self.plan.processes * workers, self.rank * workers + worker
        key = keyed.key(Purpose.STREAM, self.seed, start, share)
        buffer = self.data.window_chunks * self.data.chunk_samples
        yield from wds.DataPipeline(
            # All draw the same shards, and each opens every so-manieth of them.
            wds.ResampledShards(
                [str(place) for place in range(len(self.shards))],
                deterministic=True,
                worker_seed=lambda: int(keyed.key(Purpose.STREAM, self.seed, start)),
            ),
            lambda drawn: islice(drawn, share, None, shares),
            self._read,
            wds.shuffle(buffer, initial=buffer, rng=random.Random(int(key))),  # noqa: S311 (an order)
            lambda read: self._batches(read, key),
        )

    def _read(self, drawn: Iterable[dict[str, Any]]) -> Iterator[StreamSample]:
        for item in drawn:
            yield from read_samples(self.shards[int(item["url"])], self.data.cache)

    def _batches(self, stream: Iterable[StreamSample], key: np.uint64) -> Iterator[Batch]:
        source, lost = iter(stream), ""
        for number in count():
            batch = empty_batch(self.plan.per_process, self.data, self.patches)
            if not lost:
                try:
                    self._make(batch, source, keyed.key(Purpose.STREAM, int(key), number))
                except UserError as error:
                    lost = str(error)
            yield batch._replace(lost=lost)

    def _make(self, batch: Batch, source: Iterator[StreamSample], key: np.uint64) -> None:
        """Fill a batch with the next good images; with more bad ones than are allowed the rest stays black."""
        views, rows = self.data.views_per_image, np.arange(len(batch.images))
        numbers = keyed.uniform(key, rows, NUMBERS_PER_SAMPLE)
        words = keyed.bits(key ^ np.uint64(Purpose.AUGMENT), rows, 1)[:, 0].tolist()
        batch.noise.copy_(torch.from_numpy(keyed.uniform_float32(key ^ np.uint64(Purpose.MASK), rows, self.patches)))
        cut, row = TrainViews(batch.images, numbers, self.augmentation, words), 0
        while row < len(rows) and len(batch.bad) <= self.data.max_bad_samples:
            sample = next(source)
            try:
                cut.add(sample.image, range(row, row + views))
            except BadImageError as error:
                batch.bad.append(f"{sample.name} ({error})")
            else:
                batch.labels[row : row + views] = sample.label
                row += views
        cut.finish()


class _Stream(IterableDataset[Batch]):
    """What a `DataLoader` iterates over, in each of its workers."""

    def __init__(self, batches: StreamBatches, start: int) -> None:
        self._batches, self._start = batches, start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        return self._batches.iterate(self._start, info.id if info else 0, info.num_workers if info else 1)


def read_samples(shard: Shard, cache_dir: Path) -> Iterator[StreamSample]:
    """The images of one shard, after all of it was found to be intact.

    Raises:
        UserError: if it cannot be had, or is no intact tar.
    """
    with local_copy(shard, cache_dir) as source, mapped(source, str(shard)) as data, memoryview(data) as view:
        for sample in list(samples(list(walk(data)), str(shard))):
            if sample.image:
                member = sample.files[sample.image]
                image = bytes(view[member.offset : member.offset + member.size])
                yield StreamSample(f"{shard}: {member.name}", image, label_of(sample, view, str(shard)))


def first_images(shard: Shard, most: int, data: DataSettings) -> UInt8[Tensor, "images channels height width"]:
    """The first images of a shard that are not bad, as evaluation cuts them.

    Raises:
        UserError: if all are bad.
    """
    found: list[Tensor] = []
    for sample in read_samples(shard, data.cache):
        try:
            found.append(eval_view(decode(sample.image, data.channels), data.size, data.crop_pct))
        except BadImageError as error:
            reason = f"{sample.name} ({error})"
        if len(found) == most:
            break
    if not found:
        raise UserError(f"all images of {shard} are bad, the last: {reason}")
    return torch.stack(found)
