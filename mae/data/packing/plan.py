"""The plan of a split: which images, in which order, in which shards; fixed before anything is written.

It lies in the folder `.SPLIT.parts` of the output until the split is whole, so that an interrupted pack goes on
where it ended, and so that any number of processes on any number of machines can share the work. A million files
take about 10 s to list on a local disk, 70 MB of memory besides the names of the fullest folder, and 60 MB of disk.
"""

import mmap
import os
import shutil
import socket
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray

from mae import keyed
from mae.data.index import read_json, write_json
from mae.data.indexing import FOLDER
from mae.data.packing.sources import Item, Source, from_line, to_line
from mae.data.statistics import read_info
from mae.data.store.lock import lock
from mae.errors import UserError
from mae.files import flush
from mae.keyed import Purpose

FORMAT = 1
"""Raised when the same plan would give other bytes; a pack that was begun in another format is not continued."""
_FILE, _LINES, _ORDER = "plan.json", "items.jsonl", "order.bin"
_BLOCK = 1 << 20
# What is known only after the source was listed.
_LISTED = ("images", "bytes", "items", "classes")

T = TypeVar("T")


@dataclass(frozen=True)
class PackRules:
    """What, besides the source, decides about the bytes of the shards."""

    shard_samples: int = 10_000
    """Most images in a shard."""
    shard_bytes: float = 1e9
    """Bytes of source files after which a new shard is begun."""
    seed: int | None = 0
    """Of the order of the images; None: as they are listed."""
    provenance: bool = False
    """Whether each image's source is stored beside it."""
    short_side: int | None = None
    """Pixels to which the short sides of larger images are reduced; None: bytes stay untouched."""
    quality: int = 90
    """Of the JPEG files that reduced images become."""


@dataclass(frozen=True)
class Plan:
    """A split to be packed into `out`."""

    out: Path
    split: str
    rules: PackRules
    source: str
    classes: tuple[str, ...]
    starts: tuple[int, ...]
    """[shards + 1] place in the order with which each shard begins."""

    @property
    def parts(self) -> Path:
        """The folder of the unfinished split."""
        return parts_folder(self.out, self.split)

    @property
    def shards(self) -> int:
        """How many there will be."""
        return len(self.starts) - 1

    @property
    def images(self) -> int:
        """How many there are, good and bad."""
        return self.starts[-1]

    def filename(self, number: int) -> str:
        """`train-000123.tar`."""
        return f"{self.split}-{number:06d}.tar"

    def items(self, number: int) -> Iterator[tuple[int, Item]]:
        """The items of one shard, each with its place in the order of the whole split."""
        begin, end = self.starts[number : number + 2]
        folder = self.parts / "plan"
        places = np.fromfile(folder / _ORDER, np.int64, count=end - begin, offset=8 * begin)
        with (folder / _LINES).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for position, place in enumerate(places.tolist(), begin):
                lines.seek(place)
                yield position, from_line(lines.readline(), self.source)


def plan_split(source: Source, out: Path, split: str, rules: PackRules, is_trusted: bool = False) -> Plan:
    """The plan of a split, written into `out`; one that is there already must be the same.

    With `is_trusted` such a one is taken without listing the source again, if the settings are the same.

    Raises:
        UserError: if `out` holds the split already, was begun with other settings or images, or cannot be written;
            and as the source does.
    """
    parts = parts_folder(out, split)
    if not (parts / "plan").exists():
        _refuse_packed(out, split)
    items = _peeked(source.items)  # nothing is written before it is known that there is something to pack
    try:
        parts.mkdir(parents=True, exist_ok=True)
        with lock(parts / "plan.lock"):
            return _write_or_compare(source, items, out, split, rules, is_trusted)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None


def load_plan(out: Path, split: str) -> Plan:
    """The plan of an unfinished split.

    Raises:
        UserError: if there is none.
    """
    facts, rules, starts = _stored(parts_folder(out, split) / "plan")
    return Plan(
        out=out,
        split=split,
        rules=PackRules(**rules),
        source=facts["source"],
        classes=tuple(facts["classes"]),
        starts=tuple(starts),
    )


def parts_folder(out: Path, split: str) -> Path:
    """Where the shards of a split are until all of them are there."""
    return out / f".{split}.parts"


def remains_folder(out: Path, split: str) -> Path:
    """What is left of the parts while they are deleted."""
    return out / FOLDER / f"{split}.done"


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """The items in an order keyed by `seed`, so that every shard holds a mixture of the classes."""
    return [items[i] for i in packing_order(len(items), seed).tolist()]


def packing_order(count: int, seed: int | None) -> NDArray[np.int64]:
    """[count] the place in the list of what is packed first, second, ...; without a seed as listed."""
    if seed is None:
        return np.arange(count)
    base, words = keyed.key(Purpose.PACK, seed), np.empty(count, np.uint64)
    for start in range(0, count, _BLOCK):
        block = words[start : start + _BLOCK]
        block[:] = keyed.bits(base, np.arange(start, start + len(block)), 1)[:, 0]
    return np.argsort(words, kind="stable")


def cut(sizes: NDArray[np.int64], shard_samples: int, shard_bytes: float) -> list[int]:
    """Where shards begin, and the end: each is full with the image that completes `shard_samples` or `shard_bytes`."""
    ends, starts = np.cumsum(sizes), [0]
    most_bytes = int(min(np.ceil(shard_bytes), 2**62))  # a float would have all of `ends` copied for every shard
    while (begin := starts[-1]) < len(sizes):
        before = int(ends[begin - 1]) if begin else 0
        full = int(np.searchsorted(ends, before + most_bytes)) + 1
        starts.append(min(begin + shard_samples, full, len(sizes)))
    return starts


def _refuse_packed(out: Path, split: str) -> None:
    if split in read_info(out).get("splits", {}) or any(out.glob(f"{split}-[0-9]*.tar")):
        shutil.rmtree(remains_folder(out, split), ignore_errors=True)  # of a pack that was killed in its last moment
        raise UserError(f"{out} holds a split {split!r} already; give another --split or another --out")


def _peeked(items: Iterator[Item]) -> Iterator[Item]:
    first = next(items, None)
    return chain([] if first is None else [first], items)


def _write_or_compare(
    source: Source, items: Iterator[Item], out: Path, split: str, rules: PackRules, is_trusted: bool
) -> Plan:
    place = parts_folder(out, split) / "plan"
    if is_trusted and place.exists():
        _refuse_another(place, _facts(source, rules))
        return load_plan(out, split)
    # Named for its process: where there are no locks, another may write at the same moment.
    part = place.with_name(f"plan-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        facts, starts = _list(source, items, part, rules)
        write_json(part / _FILE, {"facts": facts, "rules": asdict(rules), "starts": starts})
        if not place.exists():
            _refuse_packed(out, split)  # another may have done it all while the source was listed
            with suppress(OSError):  # another was faster by a hair; whether it planned the same comes next
                part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _refuse_another(place, facts)
    return load_plan(out, split)


def _list(source: Source, items: Iterator[Item], folder: Path, rules: PackRules) -> tuple[dict[str, Any], list[int]]:
    """Write the items down, line by line, and in which order they are packed; returns the facts and the cuts."""
    offsets, sizes, found = array("q", [0]), array("q"), sha256()
    with (folder / _LINES).open("wb") as file:
        for item in items:
            line = to_line(item, source.name)
            file.write(line)
            found.update(line)
            offsets.append(offsets[-1] + len(line))
            sizes.append(item.size)
        flush(file)
    order = packing_order(len(sizes), rules.seed)
    with (folder / _ORDER).open("wb") as file:
        np.frombuffer(offsets, np.int64)[order].tofile(file)
        flush(file)
    ordered = np.frombuffer(sizes, np.int64)[order]
    listed = {"images": len(sizes), "bytes": int(ordered.sum()), "items": found.hexdigest(), "classes": source.classes}
    return _facts(source, rules) | listed, cut(ordered, rules.shard_samples, rules.shard_bytes)


def _facts(source: Source, rules: PackRules) -> dict[str, Any]:
    facts = {"format": FORMAT, "source": source.name, **asdict(rules)}
    # Another version of Pillow may write other bytes.
    return facts | ({"Pillow": PIL.__version__} if rules.short_side else {"quality": None})


def _stored(place: Path) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """The facts, rules and cuts of a plan."""
    try:
        stored = read_json(place / _FILE)
        return stored["facts"], stored["rules"], stored["starts"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{place / _FILE} cannot be read ({error}); delete {place.parent} to begin anew") from None


def _refuse_another(place: Path, facts: dict[str, Any]) -> None:
    stored, _, _ = _stored(place)
    for name, value in facts.items():
        if stored.get(name) != value:
            what = "its images are others" if name in _LISTED else f"{name} was {stored.get(name)}, is {value}"
            raise UserError(
                f"{place.parent} holds an unfinished pack that differs: {what}; finish that one with the source and "
                "the settings of before, or delete the folder to begin anew"
            )
