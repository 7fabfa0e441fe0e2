"""Index of a set of shards: the position of every sample, known before training starts.

The *sample id* is the number of a sample in the list of all samples of all shards, in order. An index is a folder
with two files. `samples.bin` has one `scan.RECORD` for each sample and is mapped into memory. `manifest.json`
describes each shard as it was when it was read. Nothing in an index is unpickled.
"""

import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae.data.left_out import LeftOut, joined
from mae.data.manifest import (
    Manifest,
    ShardEntry,
    StaleIndexError,
    fingerprint,
    read_manifest,
    write_manifest,
)
from mae.data.scan import BAD_LABELS, LABEL_EXTENSION, NO_LABEL, RECORD, Records
from mae.data.statistics import PixelStatistics
from mae.data.store.storage import Shard
from mae.data.store.unpacked import is_gzipped
from mae.data.tar import BLOCK
from mae.errors import UserError
from mae.files import flush

_RECORDS = "samples.bin"
_BLOCK_BYTES = 1 << 24
# 178 million samples; each GiB takes about half a second on one core.
_MAX_VERIFIED_BYTES = 4 << 30
# Missing labels that are allowed whatever the number of classes; beyond them, one in ten labels must have a sample.
_SPARE_LABELS, _LABELS_PER_CLASS = 100, 10


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Samples of a list of shards, with the ids 0 to `len(index) - 1`."""

    folder: Path
    """Folder that holds the index."""
    entries: tuple[ShardEntry, ...]
    """Shards in order."""
    records: Records = field(repr=False)
    """Array [samples] of `RECORD`, mapped from disk."""
    pixels: PixelStatistics | None
    """Mean and standard deviation of the decoded images; None if their numbers of channels differ."""
    pixels_of: int
    """Number of images that `pixels` was measured on."""
    fingerprint: str
    """sha256 of the names, positions, contents and labels of all samples; independent of the shards' location."""

    starts: NDArray[np.int64] = field(init=False, repr=False)
    """First sample id of each shard, and the number of samples: int64 [shards + 1]."""

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *(entry.samples for entry in self.entries)])
        object.__setattr__(self, "starts", starts)

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle an index without its records; the other process maps the same file."""
        return _mapped_again, (self.folder, self.entries, len(self), self.pixels, self.pixels_of, self.fingerprint)

    @property
    def label(self) -> NDArray[np.int64]:
        """Label of each sample, or `NO_LABEL`: int64 [samples]."""
        labels: NDArray[np.int64] = self.records["label"]
        return labels

    def shard_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the shard of each sample: int64 [ids]."""
        shards: NDArray[np.int64] = np.searchsorted(self.starts, sample_ids, side="right") - 1
        return shards

    def class_count(self, names: Sequence[str] | None = None) -> int:
        """Return the number of classes: that of their `names`, else the greatest label plus one.

        Raises:
            UserError: if samples have no label; it names the first. Also if a label has no name; or, without names, if
                the greatest label plus one exceeds ten times the number of different labels plus 100.
        """
        classes = self.label_count()
        different = np.unique(self.label)
        if names is not None:
            if classes > len(names):
                raise UserError(
                    f"label {classes - 1} has no name: there are {len(names)} class names, for the labels 0 to "
                    f"{len(names) - 1}; pack the shards again with all class names, or correct the labels"
                )
            return len(names)
        if classes > _LABELS_PER_CLASS * len(different) + _SPARE_LABELS:
            # The first number that is not in its place is the first that has no sample.
            missing = int(np.argmax(different != np.arange(len(different))))
            raise UserError(
                f"labels go up to {classes - 1}, but only {len(different)} of these {classes} classes have samples; "
                f"{classes - len(different)} have none, the first is {missing}; number the labels from 0 without "
                "gaps, or pack the shards with the names of all classes"
            )
        return classes

    def label_count(self) -> int:
        """Return the greatest label plus one.

        Raises:
            UserError: if samples have no label; it names the first.
        """
        unlabelled = np.flatnonzero(self.label == NO_LABEL)
        if len(unlabelled):
            (shard,) = self.shard_of(unlabelled[:1])
            number = int(unlabelled[0] - self.starts[shard])
            bad = self.left_out().get(BAD_LABELS)
            raise UserError(
                f"{len(unlabelled)} of {len(self)} samples have no valid .{LABEL_EXTENSION} label; the first is image "
                f"number {number} of {self.entries[shard].shard}; "
                + (f"{bad.number} have {BAD_LABELS}, the first: {bad.first}; " if bad else "")
                + "fine-tuning and evaluation need the number of one class for each image, not several or a real number"
            )
        return int(self.label.max()) + 1

    def bad(self) -> list[str]:
        """Return the images whose first bytes show that they cannot be decoded: `shard: key.jpg (reason)`."""
        return [f"{entry.shard}: {name}" for entry in self.entries for name in entry.bad]

    def without_image(self) -> list[str]:
        """Return the keys that have files but no image: `shard: key`."""
        return [f"{entry.shard}: {key}" for entry in self.entries for key in entry.without_image]

    def left_out(self) -> LeftOut:
        """Return what the shards hold but training does not use, by kind; the first of each as `shard: name`."""
        return joined((str(entry.shard), entry.left_out) for entry in self.entries)


def save(
    folder: Path, entries: Sequence[ShardEntry], parts: Sequence[Path], image_extension: str | None = None
) -> None:
    """Join the records of the shards, one file of `parts` for each, into an index; write the manifest last."""
    joined_records, crc32 = folder / f".{_RECORDS}.part", 0
    with joined_records.open("wb") as file:
        for block in chain.from_iterable(map(_blocks, parts)):
            crc32 = zlib.crc32(block, crc32)
            file.write(block)
        flush(file)
    # After a crash between the two renames, the checksum in the old manifest refuses the new records.
    joined_records.rename(folder / _RECORDS)
    write_manifest(folder, Manifest(tuple(entries), image_extension, crc32))


def save_pixels(index: ShardIndex, pixels: PixelStatistics | None, images: int) -> ShardIndex:
    """Store the mean and standard deviation, measured on `images` images, in the index; return the new index."""
    write_manifest(index.folder, read_manifest(index.folder)._replace(pixels=pixels, pixels_of=images))
    return replace(index, pixels=pixels, pixels_of=images)


def load(folder: Path, shards: Sequence[Shard], image_extension: str | None = None) -> ShardIndex:
    """Load the index in `folder`, which must be intact and describe `shards` as they are now.

    Raises:
        StaleIndexError: if the index is missing or damaged, or if the shards or the setting have changed.
    """
    manifest = read_manifest(folder)
    if manifest.image_extension != image_extension:
        raise StaleIndexError(f"it was made with image_extension {manifest.image_extension}, not {image_extension}")
    _require_same_shards(manifest.entries, shards)
    index = ShardIndex(
        folder=folder,
        entries=tuple(replace(entry, url=shard.url) for entry, shard in zip(manifest.entries, shards, strict=True)),
        records=_map_records(folder / _RECORDS, manifest.samples, manifest.records_crc32),
        pixels=manifest.pixels,
        pixels_of=manifest.pixels_of,
        fingerprint=fingerprint(manifest.entries),
    )
    if index.records.nbytes <= _MAX_VERIFIED_BYTES:
        _require_possible(index)
    return index


def _require_possible(index: ShardIndex) -> None:
    """Refuse records of images that do not lie in their shard, and labels that no shard can hold."""
    for entry, start in zip(index.entries, index.starts, strict=False):
        records = index.records[start : start + entry.samples]
        # An unpacked shard may be larger than its gzip file.
        size = np.uint64(2**62 if is_gzipped(entry.shard) else entry.size)
        outside = (records["offset"] < BLOCK) | (records["offset"] > size)
        outside |= records["size"] > size - np.minimum(records["offset"], size)
        if outside.any() or (records["label"] < NO_LABEL).any():
            raise StaleIndexError(f"{_RECORDS} is damaged: an image of {entry.shard} lies outside it, or has no label")


def _require_same_shards(entries: Sequence[ShardEntry], shards: Sequence[Shard]) -> None:
    if len(entries) != len(shards):
        raise StaleIndexError(f"it lists {len(entries)} shards, but there are {len(shards)}")
    for entry, shard in zip(entries, shards, strict=True):
        for what, old, new in (
            ("name", entry.shard.name, shard.name),
            ("size", entry.size, shard.size),
            ("version", entry.version, shard.version),
        ):
            if old != new:
                raise StaleIndexError(f"{shard} has changed: its {what} was {old} and is now {new}")


def _mapped_again(folder: Path, entries: tuple[ShardEntry, ...], samples: int, *rest: Any) -> ShardIndex:
    return ShardIndex(folder, entries, _map_records(folder / _RECORDS, samples), *rest)


def _map_records(path: Path, samples: int, crc32: int | None = None) -> Records:
    """Map the records into memory; compare them with `crc32` if it is given and the file is not too large.

    In a larger file a damaged record is found when its image is read and compared with the image's own crc32.
    """
    try:
        found_file = path.stat()
        if not stat.S_ISREG(found_file.st_mode):  # to open a pipe would wait for a writer
            raise StaleIndexError(f"{path.name} is not a regular file")
        present = found_file.st_size
        if present != samples * RECORD.itemsize:
            raise StaleIndexError(f"{path.name} has {present} bytes instead of {samples * RECORD.itemsize}")
        if crc32 is not None and present <= _MAX_VERIFIED_BYTES:
            found = 0
            for block in _blocks(path):
                found = zlib.crc32(block, found)
            if found != crc32:
                raise StaleIndexError(f"{path.name} is damaged: its crc32 is {found:08x}, not {crc32:08x}")
        return np.memmap(path, dtype=RECORD, mode="r", shape=(samples,))
    except OSError as error:
        raise StaleIndexError(f"{path.name} cannot be read: {error.strerror}") from None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
