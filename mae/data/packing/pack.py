"""Pack images into WebDataset shards: original bytes, labels, a class list, counts, pixel statistics, the index.

One task is one shard: read its images, decode each once to find the bad ones and to measure the pixels, write the
tar, read it back strictly, and leave a record of it beside it. Whoever does it, and after however many crashes, the
bytes are the same. Nothing has its final name before all records are there and are joined.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset import TarWriter

from mae.data.images.decode import decode, is_gray, native_channels
from mae.data.index import ShardEntry, load, parse_entry, read_json, save, save_pixels, write_json
from mae.data.indexing import FOLDER, beside
from mae.data.packing.engines import Advance, Engine
from mae.data.packing.plan import PackRules, Plan, load_plan, remains_folder
from mae.data.packing.shrink import Outcome, shrink
from mae.data.packing.sources import CLASSES_FILE, NAMES, Item, known_classes
from mae.data.scan import LABEL_EXTENSION, NO_LABEL, RECORD, scan
from mae.data.statistics import INFO_FILE, PixelStatistics, SetPixels, read_info
from mae.data.store.lock import lock
from mae.data.store.shards import Shard
from mae.errors import BadImageError, UserError, first_of
from mae.files import flush, write_atomically

BAD_FILE = "bad-images.txt"
# timm looks for jpg, png and webp only.
_PACKED_EXTENSION = {"jpeg": "jpg"}
_TOLD_EVERY = 32


@dataclass
class ShardRecord:
    """What is known of one shard once it is packed."""

    entry: ShardEntry | None = None
    """None if all its images are bad: then there is no tar."""
    bad: list[str] = field(default_factory=list)
    """Images that cannot be decoded, with reasons; they are left out, and their keys are used for no other."""
    pixels: SetPixels = field(default_factory=SetPixels)
    shrunk: int = 0
    """Images that were made smaller."""
    unsuited: int = 0
    """Images that were large, but of a kind that is left as it is."""


@dataclass(frozen=True)
class Packed:
    """What was packed."""

    filenames: list[str]
    shard_lengths: list[int]
    samples_per_class: list[int]
    """Empty if any image has no label."""
    bad: list[str]
    statistics: PixelStatistics | None
    shrunk: int
    unsuited: int

    @property
    def samples(self) -> int:
        """Images written."""
        return sum(self.shard_lengths)


def pack_shards(plan: Plan, numbers: Iterable[int], engine: Engine, advance: Advance) -> None:
    """Pack these shards of a plan, those that are not done.

    `advance` is told of images that are done and of their bytes in the source.

    Raises:
        UserError: if an image cannot be read, a label is none, another process packs the same shards, or a worker dies.
    """
    undone = []
    for number in numbers:
        if _record(plan, number) is None:
            undone.append(number)
        else:
            begin, end = plan.starts[number : number + 2]
            advance(end - begin, 0)
    engine(partial(pack_shard, plan.out, plan.split), undone, advance)
    busy = [plan.filename(number) for number in undone if _record(plan, number) is None]
    if busy:
        raise UserError(
            f"another mae pack is at {first_of(busy, separator=', ')}; run the same command again when it has finished"
        )


def pack_shard(out: Path, split: str, number: int, advance: Advance) -> None:
    """Write one shard of the plan in `out`, and the record of it; nothing if it is there or another is at it."""
    plan = load_plan(out, split)
    name = plan.filename(number)
    part = plan.parts / f"{name}.{socket.gethostname()}.{os.getpid()}.part"
    try:
        with lock(plan.parts / f"{name}.lock", wait=False) as is_ours:
            if not is_ours or _record(plan, number) is not None:
                return
            for left_over in plan.parts.glob(f"{name}.*.part"):
                left_over.unlink()
            try:
                _pack_shard(plan, number, part, advance)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{plan.parts / name} cannot be written: {error.strerror}; mend that, then run the same command again"
        ) from None


def publish(plan: Plan, skip_bad: bool) -> Packed:
    """Give all shards of a split their names and write its index, class list and entry in `_info.json`.

    It can be repeated after a crash. The index lies where training looks for it.

    Raises:
        UserError: if shards are missing, or images are bad and `skip_bad` is off, and nothing is published then;
            or if `out` cannot be written.
    """
    found = [_record(plan, number) for number in range(plan.shards)]
    missing = [plan.filename(number) for number, record in enumerate(found) if record is None]
    if missing:
        raise UserError(f"{len(missing)} of {plan.shards} shards are not packed: {first_of(missing, separator=', ')}")
    records = [record for record in found if record is not None]
    bad = [name for record in records for name in record.bad]
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {plan.images} images are bad: {first_of(bad)}; no shard was published. Leave them out with "
            f"--skip_bad True, which repeats no work; or repair them, delete {plan.parts} and pack again"
        )
    if not any(record.entry for record in records):
        raise UserError("no image could be packed: all are bad")
    try:
        (plan.out / FOLDER).mkdir(exist_ok=True)
        with lock(plan.out / FOLDER / "lock"):
            return _publish(plan, records, bad)
    except OSError as error:
        raise UserError(
            f"{plan.out} cannot be written: {error.strerror}; mend that, then run the same command again"
        ) from None


def _record(plan: Plan, number: int) -> ShardRecord | None:
    """The record of a shard that is packed; None if it is not, or not all of it is there."""
    try:
        record = _from_json(read_json(_place(plan, number, ".json")))
        if record.entry:
            whole = (record.entry.size, record.entry.samples * RECORD.itemsize)
            there = (_tar(plan, number).stat().st_size, _place(plan, number, ".bin").stat().st_size)
            return record if there == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or cut short by a crash: pack the shard
    return record


def _place(plan: Plan, number: int, suffix: str) -> Path:
    return plan.parts / f"{plan.filename(number)}{suffix}"


def _tar(plan: Plan, number: int) -> Path:
    """Where a packed shard is: an interrupted `publish` may have moved it to its place already."""
    final = plan.out / plan.filename(number)
    return final if final.exists() else plan.parts / plan.filename(number)


def _shard(path: Path) -> Shard:
    found = path.stat()
    return Shard(str(path), found.st_size, str(found.st_mtime_ns))


def _pack_shard(plan: Plan, number: int, part: Path, advance: Advance) -> None:
    record = ShardRecord()
    with part.open("xb") as file:
        is_empty = not _write_tar(plan, number, file, record, advance)
        flush(file)
    if not is_empty:
        found = scan(part, plan.filename(number))
        record.entry = ShardEntry.of(_shard(part)._replace(url=str(plan.out / plan.filename(number))), found)
        with _place(plan, number, ".bin").open("wb") as file:
            found.records.tofile(file)
            flush(file)
        part.rename(plan.parts / plan.filename(number))
    write_json(_place(plan, number, ".json"), _to_json(record))


def _write_tar(plan: Plan, number: int, file: BinaryIO, record: ShardRecord, advance: Advance) -> int:
    """Write the images of a shard one by one; returns how many were good."""
    told = [0, 0]
    with TarWriter(file, encoder=False, mtime=0) as tar:
        for position, item in plan.items(number):
            told = [told[0] + 1, told[1] + item.size]
            if told[0] == _TOLD_EVERY:
                advance(*told)
                told = [0, 0]
            try:
                files = _read(item, plan.rules, record)
            except BadImageError as error:
                record.bad.append(f"{item.name} ({error})")
            else:
                tar.write({"__key__": f"{position:09d}", **files})
    advance(*told)
    return record.pixels.images


def _read(item: Item, rules: PackRules, record: ShardRecord) -> dict[str, bytes]:
    """The files of one sample by extension; its image is measured.

    Raises:
        BadImageError: if the image cannot be decoded.
    """
    data = item.image if isinstance(item.image, bytes) else item.image.read()
    extension, outcome = _PACKED_EXTENSION.get(item.extension, item.extension), Outcome.SMALL
    if rules.short_side:
        data, outcome = shrink(data, rules.short_side, rules.quality)
        extension = "jpg" if outcome is Outcome.SHRUNK else extension
    record.pixels.add(decode(data, native_channels(data)), is_gray(data))
    record.shrunk += outcome is Outcome.SHRUNK
    record.unsuited += outcome is Outcome.UNSUITED
    files = {ending: extent.read() for ending, extent in item.side_files} | {extension: data}
    if item.label != NO_LABEL:
        files[LABEL_EXTENSION] = str(item.label).encode()
    if rules.provenance:
        if "json" in files:
            raise UserError(f"{item.name} has a .json file already; pack it without --provenance")
        files["json"] = json.dumps({"source": item.name}).encode()
    return files


def _publish(plan: Plan, records: Sequence[ShardRecord], bad: list[str]) -> Packed:
    classes = known_classes(plan.out)
    if classes and plan.classes and classes != plan.classes:
        raise UserError(
            f"{plan.out / CLASSES_FILE} has changed since this pack was begun; pack splits of the same classes into "
            f"one folder, or delete {plan.parts} and pack again"
        )
    shards = [number for number, record in enumerate(records) if record.entry]
    packed = _packed(plan, records, bad)
    for number in shards:
        _tar(plan, number).rename(plan.out / plan.filename(number))
    _save_index(plan, shards, records, packed)
    if bad:
        _write_lines(plan.out / f"{plan.split}-{BAD_FILE}", bad)
    if plan.classes:
        _write_lines(plan.out / CLASSES_FILE, plan.classes)
    _write_info(plan, packed)
    # Gone in one step: what a crash leaves of it must not look like an unfinished pack.
    remains = remains_folder(plan.out, plan.split)
    shutil.rmtree(remains, ignore_errors=True)
    plan.parts.rename(remains)
    shutil.rmtree(remains, ignore_errors=True)
    return packed


def _packed(plan: Plan, records: Sequence[ShardRecord], bad: list[str]) -> Packed:
    pixels, per_class = SetPixels(), np.zeros(len(plan.classes), np.int64)
    filenames, lengths, unlabelled = [], [], 0
    for number, record in enumerate(records):
        pixels.merge(record.pixels)
        if record.entry:
            filenames.append(plan.filename(number))
            lengths.append(record.entry.samples)
            labels = np.fromfile(_place(plan, number, ".bin"), RECORD)["label"]
            unlabelled += int((labels == NO_LABEL).sum())
            counts = np.bincount(labels[labels != NO_LABEL], minlength=len(per_class))
            per_class = np.pad(per_class, (0, len(counts) - len(per_class))) + counts
    return Packed(
        filenames=filenames,
        shard_lengths=lengths,
        samples_per_class=[] if unlabelled else per_class.tolist(),
        bad=bad,
        statistics=pixels.statistics(),
        shrunk=sum(record.shrunk for record in records),
        unsuited=sum(record.unsuited for record in records),
    )


def _save_index(plan: Plan, numbers: Sequence[int], records: Sequence[ShardRecord], packed: Packed) -> None:
    shards = [_shard(plan.out / plan.filename(number)) for number in numbers]
    folder = beside(shards)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    entries = [record.entry for record in records if record.entry]
    # Of two processes that packed the same shard, one without knowing of the other, the later left its time.
    entries = [replace(entry, version=shard.version) for entry, shard in zip(entries, shards, strict=True)]
    save(folder, entries, [_place(plan, number, ".bin") for number in numbers])
    save_pixels(load(folder, shards), packed.statistics, packed.samples)


def _write_info(plan: Plan, packed: Packed) -> None:
    """timm reads `splits`; mean, std and counts stand beside what it looks for."""
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


def _to_json(record: ShardRecord) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in ("bad", "shrunk", "unsuited")}
    return values | {"entry": record.entry and asdict(record.entry), "pixels": record.pixels.to_json()}


def _from_json(value: dict[str, Any]) -> ShardRecord:
    entry = value["entry"] and parse_entry(value["entry"])
    return ShardRecord(**value | {"entry": entry, "pixels": SetPixels.from_json(value["pixels"])})
