"""Training batches from shards that can only be read from front to back, by webdataset's own pipeline.

A stream promises less than the indexed reader, and `PROMISES` says so to the user: shards are drawn at random without
end, so an epoch is only a number of samples. But each tar is checked as a whole before any of it is used, nothing in it
is executed, and each worker of each process reads its own share of the shards.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import count, islice
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mae import keyed
from mae.data.batch import Batch, BatchRecipe, TrainingBatches, empty_batch
from mae.data.images.augment import NUMBERS_PER_SAMPLE, TrainViews
from mae.data.indexing import local_copy
from mae.data.left_out import FOLDERS, LeftOut, count_into, describe_not_used, described, joined
from mae.data.plan import BatchPlan, require_whole_images
from mae.data.read_rules import USUAL, ReadRules
from mae.data.scan import Sample, label_of, samples
from mae.data.store.shards import Shard
from mae.data.store.unpacked import is_gzipped
from mae.data.tar import mapped, walk
from mae.errors import BadImageError, UserError
from mae.keyed import Purpose
from mae.output import warn

PROMISES = (
    "data.reader is stream: shards are drawn at random with replacement, an epoch is data.stream_samples samples, "
    "images may repeat or be missing in it, and a resumed run continues with other images; "
    "the indexed reader has none of these limits"
)


Tell = Callable[[str, str], None]
"""Function that receives each kind of what is left out of a shard, and a line about it."""


class StreamSample(NamedTuple):
    """One image of a shard, still encoded."""

    name: str
    """`shard: key.jpg`"""
    image: bytes
    label: int


class StreamBatches(TrainingBatches):
    """Endless stream of micro-batches, whose sample ids are all -1."""

    def __init__(self, shards: list[Shard], plan: BatchPlan, rank: int, recipe: BatchRecipe) -> None:
        self._shards, self.plan, self.rank, self.recipe = shards, plan, rank, recipe
        require_whole_images(plan, recipe.data.views_per_image)

    @property
    def samples(self) -> int:
        """Number of samples that count as an epoch."""
        assert self.recipe.data.stream_samples is not None
        return self.recipe.data.stream_samples

    @property
    def fingerprint(self) -> str:
        """Hash of the names and sizes of the shards, whose contents are not known beforehand."""
        return sha256("".join(f"{shard.name}\0{shard.size}\0" for shard in self._shards).encode()).hexdigest()

    @property
    def shards(self) -> list[Shard]:
        """Shards that hold the data."""
        return self._shards

    def starting_at(self, micro_step: int) -> Dataset[Batch]:
        """Return the stream of a run that starts or resumes at `micro_step`; a resumed run draws other shards."""
        return _Stream(self, micro_step)

    def iterate(self, start: int, worker: int, workers: int) -> Iterator[Batch]:
        """Yield the micro-batches of one worker of this process."""
        shares, share = self.plan.processes * workers, self.rank * workers + worker
        key = keyed.key(Purpose.STREAM, self.recipe.seed, start, share)
        buffer = self.recipe.data.window_chunks * self.recipe.data.chunk_samples
        yield from wds.DataPipeline(
            # All workers draw the same list of shards, and each opens one in `shares` of it.
            wds.ResampledShards(
                [str(place) for place in range(len(self._shards))],
                deterministic=True,
                worker_seed=lambda: int(keyed.key(Purpose.STREAM, self.recipe.seed, start)),
            ),
            lambda drawn: islice(drawn, share, None, shares),
            self._read,
            wds.shuffle(buffer, initial=buffer, rng=random.Random(int(key))),  # noqa: S311 (an order)
            lambda read: self._batches(read, key),
        )

    def _read(self, drawn: Iterable[dict[str, Any]]) -> Iterator[StreamSample]:
        """Yield the samples of the shards that are drawn; name the first shard with each kind that is left out."""
        empty, data, told = set[int](), self.recipe.data, set[str]()

        def tell_once(kind: str, text: str) -> None:
            if kind not in told:
                warn(f"{text}; other shards like this are not named")
            told.add(kind)

        for item in drawn:
            number = int(item["url"])
            empty.add(number)
            for sample in read_samples(self._shards[number], data.cache, data.rules, tell_once):
                empty.discard(number)
                yield sample
            if len(empty) == len(self._shards):
                raise UserError(f"none of the {len(empty)} shards has an image, the first: {self._shards[0]}")

    def _batches(self, stream: Iterable[StreamSample], key: np.uint64) -> Iterator[Batch]:
        source, lost = iter(stream), ""
        for number in count():
            batch = empty_batch(self.plan.per_process, self.recipe.data, self.recipe.noise_columns)
            if not lost:
                try:
                    self._fill(batch, source, keyed.key(Purpose.STREAM, int(key), number))
                except UserError as error:
                    lost = str(error)
            yield batch._replace(lost=lost)

    def _fill(self, batch: Batch, source: Iterator[StreamSample], key: np.uint64) -> None:
        """Fill a batch with the next good images; after more bad ones than allowed, the other rows stay black."""
        data, rows = self.recipe.data, np.arange(len(batch.images))
        views, noise_columns = data.views_per_image, self.recipe.noise_columns
        numbers = keyed.uniform(key, rows, NUMBERS_PER_SAMPLE)
        words = keyed.bits(key ^ np.uint64(Purpose.AUGMENT), rows, 1)[:, 0].tolist()
        batch.noise.copy_(torch.from_numpy(keyed.uniform_float32(key ^ np.uint64(Purpose.MASK), rows, noise_columns)))
        cut, row = TrainViews(batch.images, numbers, self.recipe.augment, words, data.value_range, data.mean), 0
        while row < len(rows) and len(batch.bad) <= data.max_bad_samples:
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
    """Stream over which each worker of a `DataLoader` iterates."""

    def __init__(self, batches: StreamBatches, start: int) -> None:
        self._batches, self._start = batches, start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        return self._batches.iterate(self._start, info.id if info else 0, info.num_workers if info else 1)


def read_samples(
    shard: Shard, cache_dir: Path, rules: ReadRules = USUAL, tell: Tell = lambda kind, text: None
) -> Iterator[StreamSample]:
    """Check a whole shard, then yield its images; `tell` gets each kind that it holds beside them, or that it has none.

    Raises:
        UserError: if the shard cannot be read, is a damaged tar, or its samples are unclear.
    """
    with (
        local_copy(shard, cache_dir, rules.cache_bytes) as source,
        mapped(source, str(shard)) as data,
        memoryview(data) as view,
    ):
        found, left_out = _listed(data, shard, rules)
        for kind, counted in left_out.items():
            tell(kind, f"left out of shard {shard}: {described({kind: counted})}")
        if not any(sample.image for sample in found):
            tell("shards without images", f"shard {shard} has no images")
        for sample in found:
            if sample.image:
                member = sample.files[sample.image]
                image = bytes(view[member.offset : member.offset + member.size])
                yield StreamSample(f"{shard}: {member.name}", image, label_of(sample, view))


def not_used_of_stream(shards: Iterable[Shard], cache_dir: Path, rules: ReadRules) -> list[str]:
    """Return what the shards on this machine hold but training does not use, in words.

    Remote and gzipped shards are passed over, because they would have to be copied first.

    Raises:
        UserError: if a shard cannot be read, is a damaged tar, or its samples are unclear.
    """
    parts, empty = list[tuple[str, LeftOut]](), list[str]()
    for shard in shards:
        if shard.is_remote or is_gzipped(shard):
            continue
        with local_copy(shard, cache_dir, rules.cache_bytes) as source, mapped(source, str(shard)) as data:
            found, left_out = _listed(data, shard, rules)
        parts.append((str(shard), left_out))
        if not any(sample.image for sample in found):
            empty.append(str(shard))
    return describe_not_used(joined(parts), empty, len(parts))


def _listed(data: mmap, shard: Shard, rules: ReadRules) -> tuple[list[Sample], LeftOut]:
    """Return the samples of a whole shard, with or without image, and what it holds beside them."""
    left_out = LeftOut()
    leave_out = count_into(left_out)
    found = list(samples(walk(data, leave_out), str(shard), rules.image_extension, leave_out))
    left_out.pop(FOLDERS, None)
    return found, left_out
