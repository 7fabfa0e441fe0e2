"""Record of a packed shard, in a JSON file beside it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from mae.data.manifest import ShardEntry, parse_entry, write_json
from mae.data.packing.plan import Plan
from mae.data.scan import RECORD
from mae.data.statistics import SetPixels
from mae.data.store.regular import read_json


@dataclass
class ShardRecord:
    """Result of packing one shard."""

    entry: ShardEntry | None = None
    """Entry of the index; None if all images are bad, and so there is no tar."""
    bad: list[str] = field(default_factory=list)
    """Images that cannot be decoded, with reasons; they are left out, and their keys stay unused."""
    pixels: SetPixels = field(default_factory=SetPixels)
    shrunk: int = 0
    """Number of images that were made smaller."""
    unsuited: int = 0
    """Number of large images whose kind is never made smaller."""
    converted: dict[str, int] = field(default_factory=dict)
    """Number of images that were converted to PNG, by extension."""


def write_record(plan: Plan, number: int, record: ShardRecord) -> None:
    """Write the record of a shard."""
    values = {name: getattr(record, name) for name in ("bad", "shrunk", "unsuited", "converted")}
    values |= {"entry": record.entry and asdict(record.entry), "pixels": record.pixels.to_json()}
    write_json(part_path(plan, number, ".json"), values)


def read_record(plan: Plan, number: int) -> ShardRecord | None:
    """Return the record of a packed shard; None if the shard is not packed, or one of its files is incomplete."""
    try:
        values = read_json(part_path(plan, number, ".json"))
        entry = values["entry"] and parse_entry(values["entry"])
        record = ShardRecord(**values | {"entry": entry, "pixels": SetPixels.from_json(values["pixels"])})
        if record.entry:
            expected = (record.entry.size, record.entry.samples * RECORD.itemsize)
            found = (tar_path(plan, number).stat().st_size, part_path(plan, number, ".bin").stat().st_size)
            return record if found == expected else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or cut short by a crash
    return record


def part_path(plan: Plan, number: int, suffix: str) -> Path:
    """Return the path of a file of a shard before its split is published."""
    return plan.parts / f"{plan.filename(number)}{suffix}"


def tar_path(plan: Plan, number: int) -> Path:
    """Return the path of a packed shard, which an interrupted `publish` may have moved already."""
    final = plan.out / plan.filename(number)
    return final if final.exists() else plan.parts / plan.filename(number)
