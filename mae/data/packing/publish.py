"""Publish a packed split: move its shards to their place, and write index, class list, counts and statistics."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.classes import CLASSES_FILE, NAMES
from mae.data.images.levels import WideValues
from mae.data.index import load, save, save_pixels
from mae.data.indexing import FOLDER, beside
from mae.data.manifest import write_json
from mae.data.packing.class_list import known_classes, quoted
from mae.data.packing.plan import Plan, remains_folder
from mae.data.packing.record import ShardRecord, part_path, read_record, tar_path
from mae.data.scan import NO_LABEL, RECORD
from mae.data.statistics import INFO_FILE, PixelStatistics, SetPixels, read_info
from mae.data.store.lock import lock
from mae.data.store.storage import Shard
from mae.errors import UserError, first_of
from mae.files import write_atomically
from mae.output import counted

BAD_FILE = "bad-images.txt"
# Larger labels cannot be places in a list of counts.
_MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class Packed:
    """Split that was published."""

    filenames: list[str]
    shard_lengths: list[int]
    samples_per_class: list[int]
    """Number of samples of each class; empty if an image has no label, or one that is too large to count to."""
    bad: list[str]
    statistics: PixelStatistics | None
    wide: WideValues
    shrunk: int
    unsuited: int
    converted: Mapping[str, int]
    """Number of images that were converted to PNG, by extension."""

    @property
    def samples(self) -> int:
        """Number of images in the shards."""
        return sum(self.shard_lengths)


def publish(plan: Plan, skip_bad: bool) -> Packed:
    """Move all shards of a split to their place, and write index, class list and the split's entry in `_info.json`.

    The index is written where training finds it. After a crash, call this function again.

    Raises:
        UserError: before anything is published, if shards are missing, all images are bad, or some are bad and
            `skip_bad` is off; or if `out` cannot be written.
    """
    found = [read_record(plan, number) for number in range(plan.shards)]
    missing = [plan.filename(number) for number, record in enumerate(found) if record is None]
    if missing:
        names = first_of(missing, separator=", ")
        raise UserError(f"{len(missing)} of {plan.shards} shards are not packed: {names}; pack them first")
    records = [record for record in found if record is not None]
    bad = [name for record in records for name in record.bad]
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {plan.images} images are bad: {first_of(bad)}; no shard was published. Leave them out with "
            f"--skip_bad True, which repeats no work; or repair them, delete {plan.parts} and pack again"
        )
    if not any(record.entry for record in records):
        raise UserError(
            f"all {plan.images} images are bad: {first_of(bad)}; repair them, delete {plan.parts} and pack again"
        )
    try:
        (plan.out / FOLDER).mkdir(exist_ok=True)
        with lock(plan.out / FOLDER / "lock"):
            return _publish(plan, records, bad)
    except OSError as error:
        raise UserError(
            f"{error.filename or plan.out} cannot be written: {error.strerror}; fix that, then run the same command "
            "again"
        ) from None


def describe(plan: Plan, packed: Packed) -> str:
    """Describe a published split in one line."""
    parts = [
        f"{plan.split}: {counted(packed.samples, 'image')} in {counted(len(packed.filenames), 'shard')} at {plan.out}"
    ]
    if plan.classes:
        parts.append(_describe_classes(plan.classes, packed.samples_per_class))
    if packed.statistics:
        parts.append(str(packed.statistics))
    if packed.wide.images:
        parts.append(packed.wide.advice)
    if packed.converted:
        counts = ", ".join(f"{count:,} .{kind}" for kind, count in sorted(packed.converted.items()))
        parts.append(f"converted to PNG: {counts}{' (first frame)' if 'gif' in packed.converted else ''}")
    if plan.rules.short_side:
        parts.append(f"{counted(packed.shrunk, 'image')} made smaller (short side {plan.rules.short_side})")
    if packed.unsuited:
        parts.append(f"{packed.unsuited:,} larger images left unchanged: not 8-bit gray or RGB")
    if packed.bad:
        parts.append(f"{counted(len(packed.bad), 'bad image')} left out, listed in {plan.split}-{BAD_FILE}")
    return ", ".join(parts)


def _describe_classes(classes: Sequence[str], samples: Sequence[int]) -> str:
    empty = [name for name, count in zip(classes, samples, strict=False) if not count]
    without = f", {len(empty)} of them without images: {quoted(empty)}" if empty else ""
    return f"{len(classes)} classes ({quoted(classes, 3)}{without})"


def _publish(plan: Plan, records: Sequence[ShardRecord], bad: list[str]) -> Packed:
    classes = known_classes(plan.out)
    if classes and plan.classes and classes != plan.classes:
        raise UserError(
            f"{plan.out / CLASSES_FILE} has changed since this pack started; pack splits of the same classes into "
            f"one folder, or delete {plan.parts} and pack again"
        )
    shards = [number for number, record in enumerate(records) if record.entry]
    packed = _packed(plan, records, bad)
    for number in shards:
        tar_path(plan, number).rename(plan.out / plan.filename(number))
    _save_index(plan, shards, records, packed)
    if bad:
        _write_lines(plan.out / f"{plan.split}-{BAD_FILE}", bad)
    if plan.classes:
        _write_lines(plan.out / CLASSES_FILE, plan.classes)
    _write_info(plan, packed)
    # A rename first: if a crash interrupts the removal, the rest must not look like an unfinished pack.
    remains = remains_folder(plan.out, plan.split)
    shutil.rmtree(remains, ignore_errors=True)
    plan.parts.rename(remains)
    shutil.rmtree(remains, ignore_errors=True)
    return packed


def _packed(plan: Plan, records: Sequence[ShardRecord], bad: list[str]) -> Packed:
    pixels, per_class, converted = SetPixels(), np.zeros(len(plan.classes), np.int64), Counter[str]()
    filenames, lengths, uncounted = [], [], 0
    for number, record in enumerate(records):
        pixels.merge(record.pixels)
        converted.update(record.converted)
        if record.entry:
            filenames.append(plan.filename(number))
            lengths.append(record.entry.samples)
            labels = np.fromfile(part_path(plan, number, ".bin"), RECORD)["label"]
            is_counted = (labels != NO_LABEL) & (labels < _MAX_CLASSES)
            uncounted += int((~is_counted).sum())
            counts = np.bincount(labels[is_counted], minlength=len(per_class))
            per_class = np.pad(per_class, (0, len(counts) - len(per_class))) + counts
    return Packed(
        filenames=filenames,
        shard_lengths=lengths,
        samples_per_class=[] if uncounted else per_class.tolist(),
        bad=bad,
        statistics=pixels.statistics(),
        wide=pixels.wide,
        shrunk=sum(record.shrunk for record in records),
        unsuited=sum(record.unsuited for record in records),
        converted=converted,
    )


def _save_index(plan: Plan, numbers: Sequence[int], records: Sequence[ShardRecord], packed: Packed) -> None:
    shards = [Shard.of_file(plan.out / plan.filename(number)) for number in numbers]
    folder = beside(shards)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    entries = [record.entry for record in records if record.entry]
    # If two processes packed the same shard (without locks), the file has the time of the later one.
    entries = [replace(entry, version=shard.version) for entry, shard in zip(entries, shards, strict=True)]
    save(folder, entries, [part_path(plan, number, ".bin") for number in numbers])
    save_pixels(load(folder, shards), packed.statistics, packed.samples)


def _write_info(plan: Plan, packed: Packed) -> None:
    """Write the split's entry of `_info.json`: the keys that timm reads, and beside them mean, std and counts."""
    entry: dict[str, Any] = {
        "name": plan.split,
        "num_samples": packed.samples,
        "filenames": packed.filenames,
        "shard_lengths": packed.shard_lengths,
    }
    if packed.samples_per_class:
        entry["samples_per_class"] = packed.samples_per_class
    if packed.statistics is not None:
        entry |= {"mean": list(packed.statistics.mean), "std": list(packed.statistics.std)}
    info = read_info(plan.out)
    info.setdefault("splits", {})[plan.split] = entry
    write_json(plan.out / INFO_FILE, info)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_atomically(path, ("\n".join(lines) + "\n").encode(**NAMES))
