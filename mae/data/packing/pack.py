"""Pack images into WebDataset shards, one task per shard.

A task decodes each image once, to find bad images and to measure pixels. It writes the tar, reads it back with all
checks, and writes a record beside it. The bytes do not depend on the engine or on crashes before.
"""

import json
import os
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from webdataset import TarWriter

from mae.data.manifest import ShardEntry
from mae.data.packing.convert import CONVERTED, RENAMED, to_png
from mae.data.packing.engines import Advance, Engine
from mae.data.packing.items import Item, shown
from mae.data.packing.plan import PackRules, Plan, load_plan
from mae.data.packing.record import ShardRecord, part_path, read_record, write_record
from mae.data.packing.shrink import Outcome, shrink
from mae.data.scan import LABEL_EXTENSION, NO_LABEL, parse_label, scan
from mae.data.store.lock import lock
from mae.data.store.storage import Shard
from mae.errors import BadImageError, UserError, first_of
from mae.files import flush

_REPORT_EVERY = 32
# Bytes of a bad label in a message.
_MAX_SHOWN = 20


def pack_shards(plan: Plan, numbers: Iterable[int], engine: Engine, advance: Advance) -> None:
    """Pack those of the given shards that are not finished; report images and their bytes to `advance`.

    Raises:
        UserError: if an image cannot be read, a label is invalid, a worker dies, or another process packs the same
            shards.
    """
    unfinished = []
    for number in numbers:
        if read_record(plan, number) is None:
            unfinished.append(number)
        else:
            begin, end = plan.starts[number : number + 2]
            advance(end - begin, 0)
    engine(partial(pack_shard, plan.out, plan.split), unfinished, advance)
    busy = [plan.filename(number) for number in unfinished if read_record(plan, number) is None]
    if busy:
        raise UserError(
            f"another mae pack is writing {first_of(busy, separator=', ')}; run the same command again after it"
        )


def pack_shard(out: Path, split: str, number: int, advance: Advance) -> None:
    """Write one shard of the plan in `out` and its record, unless it is finished or another process is writing it."""
    plan = load_plan(out, split)
    name = plan.filename(number)
    part = plan.parts / f"{name}.{socket.gethostname()}.{os.getpid()}.part"
    try:
        with lock(plan.parts / f"{name}.lock", wait=False) as is_ours:
            if not is_ours or read_record(plan, number) is not None:
                return
            for leftover in plan.parts.glob(f"{name}.*.part"):
                leftover.unlink()
            try:
                _pack_shard(plan, number, part, advance)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{plan.parts / name} cannot be written: {error.strerror}; fix that, then run the same command again"
        ) from None


def describe_part(plan: Plan, shards: range) -> str:
    """Describe in one line a split of which only `shards` were packed."""
    which = f"shards {shards.start} to {shards.stop - 1}" if shards else "none"
    return (
        f"{plan.split}: {plan.images:,} images make {plan.shards} shards, of which {which} are packed; "
        "when all are packed, the same command without --shard_range publishes them"
    )


def _pack_shard(plan: Plan, number: int, part: Path, advance: Advance) -> None:
    record = ShardRecord()
    with part.open("xb") as file:
        is_empty = not _write_tar(plan, number, file, record, advance)
        flush(file)
    if not is_empty:
        found = scan(part, plan.filename(number))
        record.entry = ShardEntry.of(Shard.of_file(part)._replace(url=str(plan.out / plan.filename(number))), found)
        with part_path(plan, number, ".bin").open("wb") as file:
            found.records.tofile(file)
            flush(file)
        part.rename(plan.parts / plan.filename(number))
    write_record(plan, number, record)


def _write_tar(plan: Plan, number: int, file: BinaryIO, record: ShardRecord, advance: Advance) -> int:
    """Write the images of a shard one by one, and return how many were good."""
    images, size = 0, 0
    # Without keep_meta, side files whose extension begins with "_" would be dropped.
    with TarWriter(file, encoder=False, mtime=0, keep_meta=True) as tar:
        for position, item in plan.items(number):
            images, size = images + 1, size + item.size
            if images == _REPORT_EVERY:
                advance(images, size)
                images, size = 0, 0
            try:
                files = _read(item, plan.rules, record)
            except BadImageError as error:
                record.bad.append(f"{shown(item.name)} ({error})")
            else:
                _check_label(files.get(LABEL_EXTENSION, b"0"), item.name, len(plan.classes))
                tar.write({"__key__": f"{position:09d}", **files})
    advance(images, size)
    return record.pixels.images


def _read(item: Item, rules: PackRules, record: ShardRecord) -> dict[str, bytes]:
    """Return the files of one sample by extension, and add its pixels to `record`.

    Raises:
        BadImageError: if the image cannot be decoded.
    """
    data = item.image if isinstance(item.image, bytes) else item.image.read()
    extension, outcome = RENAMED.get(item.extension, item.extension), Outcome.SMALL
    if is_converted := extension in CONVERTED:
        data, extension = to_png(data, extension), "png"
    if rules.short_side:
        data, outcome = shrink(data, rules.short_side, rules.quality)
        extension = "jpg" if outcome is Outcome.SHRUNK else extension
    record.pixels.add_native(data)
    record.shrunk += outcome is Outcome.SHRUNK
    record.unsuited += outcome is Outcome.UNSUITED
    if is_converted:
        record.converted[item.extension] = record.converted.get(item.extension, 0) + 1
    files = {ending: extent.read() for ending, extent in item.side_files} | {extension: data}
    if "__key__" in files:
        raise UserError(f"{shown(item.name)} has a file .__key__, a name that webdataset needs itself; rename it")
    if item.label != NO_LABEL:
        files[LABEL_EXTENSION] = str(item.label).encode()
    if rules.provenance:
        if "json" in files:
            raise UserError(f"{item.name} already has a .json file; pack it without --provenance")
        files["json"] = json.dumps({"source": item.name}).encode()
    return files


def _check_label(text: bytes, name: str, classes: int) -> None:
    """Raise a `UserError` that names the image in the source if its label is no number, or not one of the classes."""
    label = parse_label(text)
    if label is None:
        raise UserError(
            f"{shown(name)}.{LABEL_EXTENSION} is {text[:_MAX_SHOWN]!r}; allowed: an integer >= 0 of at most 18 digits; "
            "correct it, or pack without labels: --labels none"
        )
    if classes and label >= classes:
        raise UserError(
            f"{shown(name)} has label {label}, but there are {classes} classes, whose labels begin at 0; correct "
            "the class list, or pack without labels: --labels none"
        )
