"""Record of a packed shard: what is known of it, in a file beside it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mae.data.index import ShardEntry, parse_entry, read_json, write_json
from mae.data.packing.plan import Plan
from mae.data.scan import RECORD
from mae.data.statistics import SetPixels


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


def write_record(plan: Plan, number: int, record: ShardRecord) -> None:
    """Write the record of a shard."""
    write_json(part_path(plan, number, ".json"), _to_json(record))


def read_record(plan: Plan, number: int) -> ShardRecord | None:
    """The record of a shard that is packed; None if it is not, or not all of it is there."""
    try:
        record = _from_json(read_json(part_path(plan, number, ".json")))
        if record.entry:
            whole = (record.entry.size, record.entry.samples * RECORD.itemsize)
            there = (tar_path(plan, number).stat().st_size, part_path(plan, number, ".bin").stat().st_size)
            return record if there == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or cut short by a crash: pack the shard
    return record


def part_path(plan: Plan, number: int, suffix: str) -> Path:
    """Return where a file of a shard is until its split is published."""
    return plan.parts / f"{plan.filename(number)}{suffix}"


def tar_path(plan: Plan, number: int) -> Path:
    """Where a packed shard is: an interrupted `publish` may have moved it to its place already."""
    final = plan.out / plan.filename(number)
    return final if final.exists() else plan.parts / plan.filename(number)


def _to_json(record: ShardRecord) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in ("bad", "shrunk", "unsuited")}
    return values | {"entry": record.entry and asdict(record.entry), "pixels": record.pixels.to_json()}


def _from_json(value: dict[str, Any]) -> ShardRecord:
    entry = value["entry"] and parse_entry(value["entry"])
    return ShardRecord(**value | {"entry": entry, "pixels": SetPixels.from_json(value["pixels"])})
