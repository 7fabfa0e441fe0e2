"""Plan of a split: its images, their order, and their shards; fixed before any shard is written.

The plan is in the folder `.SPLIT.parts` of the output until the split is published. An interrupted pack resumes from
it, and processes on several machines share the work through it. To list a million files takes about 10 s on a local
disk, 60 MB of disk, and 70 MB of memory plus the names in the largest folder.
"""

import mmap
import os
import shutil
import socket
from array import array
from collections.abc import Iterator, Mapping, Sequence
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
from mae.data.indexing import FOLDER
from mae.data.manifest import write_json
from mae.data.packing.convert import readers
from mae.data.packing.items import Item, Source, from_line, to_line
from mae.data.statistics import read_info
from mae.data.store.lock import lock
from mae.data.store.regular import read_json
from mae.errors import UserError
from mae.files import flush
from mae.keyed import Purpose

FORMAT = 1
"""Version of the bytes that a plan gives; a pack that was started in another version is not resumed."""
_PLAN_FILE, _ITEMS_FILE, _ORDER_FILE = "plan.json", "items.jsonl", "order.bin"
_BLOCK = 1 << 20
# Facts that are known only after the source was listed.
_LISTED = ("images", "bytes", "items", "classes")

T = TypeVar("T")


@dataclass(frozen=True)
class PackRules:
    """Settings that, with the source, determine the bytes of the shards."""

    shard_samples: int = 10_000
    """Maximum number of images in a shard."""
    shard_bytes: float = 1e9
    """Bytes of source files after which a new shard starts."""
    seed: int | None = 0
    """Seed of the order of the images; None: the order in which the source lists them."""
    provenance: bool = False
    """Whether to store each image's source beside it."""
    short_side: int | None = None
    """Pixels of the short side to which larger images are reduced; None: image bytes stay unchanged."""
    quality: int = 90
    """JPEG quality of reduced images."""


@dataclass(frozen=True)
class Plan:
    """Plan of the split that is packed into `out`."""

    out: Path
    split: str
    rules: PackRules
    source: str
    classes: tuple[str, ...]
    starts: tuple[int, ...]
    """[shards + 1] position of each shard's first image in the order; the last is the number of images."""
    notices: tuple[str, ...] = ()
    """Lines about the source to show to the user, such as files that are left out."""

    @property
    def parts(self) -> Path:
        """Folder of the unfinished split."""
        return parts_folder(self.out, self.split)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.starts) - 1

    @property
    def images(self) -> int:
        """Number of images, good and bad."""
        return self.starts[-1]

    def filename(self, number: int) -> str:
        """Return the name of a shard, such as `train-000123.tar`."""
        return f"{self.split}-{number:06d}.tar"

    def items(self, number: int) -> Iterator[tuple[int, Item]]:
        """Yield the items of one shard, each with its position in the order of the split."""
        begin, end = self.starts[number : number + 2]
        folder = self.parts / "plan"
        offsets = np.fromfile(folder / _ORDER_FILE, np.int64, count=end - begin, offset=8 * begin)
        with (folder / _ITEMS_FILE).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for position, offset in enumerate(offsets.tolist(), begin):
                lines.seek(offset)
                yield position, from_line(lines.readline(), self.source)


def plan_split(source: Source, out: Path, split: str, rules: PackRules, is_trusted: bool = False) -> Plan:
    """Write the plan of a split into `out` and return it; an existing plan must be the same.

    With `is_trusted`, an existing plan with the same settings is used without listing the source again.

    Raises:
        UserError: if `out` already contains the split, has an unfinished pack of other images or settings, or cannot
            be written; or if the source cannot be listed.
    """
    parts = parts_folder(out, split)
    if not (parts / "plan").exists():
        _refuse_packed(out, split)
    items = _peeked(source.items)  # an empty source fails here, before anything is written
    try:
        parts.mkdir(parents=True, exist_ok=True)
        with lock(parts / "plan.lock"):
            return _write_or_compare(source, items, out, split, rules, is_trusted)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; fix that, or choose another --out") from None


def plan_splits(sources: Mapping[str, Source], out: Path, rules: PackRules, is_trusted: bool = False) -> list[Plan]:
    """Plan each split of one command; return the plans of those that are not packed yet.

    All are planned before the first is published. After a crash, the plan of another split therefore shows that a
    packed split is complete and was packed by the same command.

    Raises:
        UserError: for a reason of `plan_split`.
    """
    planned = [split for split in sources if (parts_folder(out, split) / "plan").exists()]
    packed = [split for split in sources if planned and split not in planned and _is_packed(out, split)]
    todo = {split: source for split, source in sources.items() if split not in packed}
    return [plan_split(source, out, split, rules, is_trusted) for split, source in todo.items()]


def load_plan(out: Path, split: str) -> Plan:
    """Return the plan of an unfinished split.

    Raises:
        UserError: if there is none.
    """
    stored = _stored(parts_folder(out, split) / "plan")
    return Plan(
        out=out,
        split=split,
        rules=PackRules(**stored["rules"]),
        source=stored["facts"]["source"],
        classes=tuple(stored["facts"]["classes"]),
        starts=tuple(stored["starts"]),
        notices=tuple(stored["notices"]),
    )


def parts_folder(out: Path, split: str) -> Path:
    """Return the folder of a split's shards until they are published."""
    return out / f".{split}.parts"


def remains_folder(out: Path, split: str) -> Path:
    """Return the folder to which the parts are moved for removal."""
    return out / FOLDER / f"{split}.done"


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """Return the items in an order given by `seed`, so that every shard contains a mixture of classes."""
    return [items[i] for i in packing_order(len(items), seed).tolist()]


def packing_order(count: int, seed: int | None) -> NDArray[np.int64]:
    """Return [count] indices of the images in the order of packing; without a seed, the order of the list."""
    if seed is None:
        return np.arange(count)
    base, words = keyed.key(Purpose.PACK, seed), np.empty(count, np.uint64)
    for start in range(0, count, _BLOCK):
        block = words[start : start + _BLOCK]
        block[:] = keyed.bits(base, np.arange(start, start + len(block)), 1)[:, 0]
    return np.argsort(words, kind="stable")


def shard_starts(sizes: NDArray[np.int64], shard_samples: int, shard_bytes: float) -> list[int]:
    """Cut images of the given bytes into shards, each full at `shard_samples` or `shard_bytes`; see `Plan.starts`."""
    ends, starts = np.cumsum(sizes), [0]
    max_bytes = int(min(np.ceil(shard_bytes), 2**62))  # searching for a float would copy `ends` for every shard
    while (begin := starts[-1]) < len(sizes):
        before = int(ends[begin - 1]) if begin else 0
        full = int(np.searchsorted(ends, before + max_bytes)) + 1
        starts.append(min(begin + shard_samples, full, len(sizes)))
    return starts


def _is_packed(out: Path, split: str) -> bool:
    is_there = split in read_info(out).get("splits", {}) or any(out.glob(f"{split}-[0-9]*.tar"))
    if is_there:
        shutil.rmtree(remains_folder(out, split), ignore_errors=True)  # left if publish was killed at its end
    return is_there


def _refuse_packed(out: Path, split: str) -> None:
    if _is_packed(out, split):
        entry, complete = read_info(out).get("splits", {}).get(split), ""
        if entry is not None:  # else the shards are of another program
            size = f"{entry.get('num_samples')} images in {len(entry.get('filenames', []))} shards"
            complete = f", which is complete ({size}): if this command packed it and was interrupted after that, "
            complete += "nothing is left to do; to pack something else"
        raise UserError(f"{out} already contains a split {split!r}{complete}; choose another --split or another --out")


def _peeked(items: Iterator[Item]) -> Iterator[Item]:
    first = next(items, None)
    return chain([] if first is None else [first], items)


def _write_or_compare(
    source: Source, items: Iterator[Item], out: Path, split: str, rules: PackRules, is_trusted: bool
) -> Plan:
    place = parts_folder(out, split) / "plan"
    if is_trusted and place.exists():
        _refuse_different(place, _facts(source, rules))
        return load_plan(out, split)
    # The name contains the process: without locks, another process may write a plan at the same time.
    part = place.with_name(f"plan-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        facts, starts = _list(source, items, part, rules)
        plan = {"facts": facts, "rules": asdict(rules), "starts": starts, "notices": source.notices()}
        write_json(part / _PLAN_FILE, plan)
        if not place.exists():
            _refuse_packed(out, split)  # another process may have finished while the source was listed
            with suppress(OSError):  # another process was faster; its plan is compared below
                part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _refuse_different(place, facts)
    return load_plan(out, split)


def _list(source: Source, items: Iterator[Item], folder: Path, rules: PackRules) -> tuple[dict[str, Any], list[int]]:
    """Write the items and their order of packing; return the facts and the start of each shard."""
    offsets, sizes, found, extensions = array("q", [0]), array("q"), sha256(), set[str]()
    with (folder / _ITEMS_FILE).open("wb") as file:
        for item in items:
            line = to_line(item, source.name)
            file.write(line)
            found.update(line)
            offsets.append(offsets[-1] + len(line))
            sizes.append(item.size)
            extensions.add(item.extension)
        flush(file)
    order = packing_order(len(sizes), rules.seed)
    with (folder / _ORDER_FILE).open("wb") as file:
        np.frombuffer(offsets, np.int64)[order].tofile(file)
        flush(file)
    ordered = np.frombuffer(sizes, np.int64)[order]
    listed = {"images": len(sizes), "bytes": int(ordered.sum()), "items": found.hexdigest(), "classes": source.classes}
    facts = _facts(source, rules) | listed | readers(extensions)
    return facts, shard_starts(ordered, rules.shard_samples, rules.shard_bytes)


def _facts(source: Source, rules: PackRules) -> dict[str, Any]:
    facts = {"format": FORMAT, "source": source.name, **asdict(rules)}
    if source.splits:
        facts["splits"] = list(source.splits)
    # Another version of Pillow may write different bytes.
    return facts | ({"Pillow": PIL.__version__} if rules.short_side else {"quality": None})


def _stored(place: Path) -> dict[str, Any]:
    """Return the facts, rules, shard starts and notices of a plan."""
    try:
        stored = {"notices": []} | read_json(place / _PLAN_FILE)
        if not isinstance(stored["facts"], dict):
            raise ValueError("its facts are not a mapping")
        return stored
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{place / _PLAN_FILE} cannot be read ({error}); delete {place.parent} to start again"
        ) from None


def _refuse_different(place: Path, facts: dict[str, Any]) -> None:
    stored = _stored(place)["facts"]
    for name, value in facts.items():
        if stored.get(name) != value:
            what = "its images are different" if name in _LISTED else f"{name} was {stored.get(name)}, now {value}"
            raise UserError(
                f"{place.parent} contains an unfinished pack that differs: {what}; finish it with its own source and "
                "settings, or delete the folder to start again"
            )
