"""Packs of a few images, and what is in them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import png
from PIL import Image

from mae.data.images.decode import decode
from mae.data.index import ShardIndex, load
from mae.data.indexing import beside
from mae.data.packing.class_list import ClassList, fixed_classes
from mae.data.packing.engines import process_engine
from mae.data.packing.items import Item, Source
from mae.data.packing.pack import pack_shards
from mae.data.packing.plan import PackRules, Plan, plan_split
from mae.data.packing.publish import Packed, publish
from mae.data.packing.sources import find_images
from mae.data.packing.trees import Labels
from mae.data.reader import ImageReader
from mae.data.statistics import PixelStatistics, PixelSums
from mae.data.store.shards import expand
from mae.data.store.unpacked import CACHE_BYTES

NOWHERE = Path("/nowhere")
RULES = PackRules(shard_samples=5, seed=None)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(number, mode="RGB"))).save(buffer, format="JPEG")
    return buffer.getvalue()


def listed(source: Path | str, known: tuple[str, ...] = (), labels: Labels = "auto") -> tuple[Source, dict[str, Item]]:
    """A source after its listing, and its images by name."""
    found = find_images(str(source), NOWHERE, ClassList(known, "the packed classes.txt"), labels)
    return found, {item.name: item for item in found.items}


def planned(source: Path | Source, out: Path, split: str = "train", rules: PackRules = RULES, **other: Any) -> Plan:
    found = source if isinstance(source, Source) else find_images(str(source), NOWHERE, fixed_classes(None, out))
    return plan_split(found, out, split, rules, **other)


def pack(
    source: Path | Source,
    out: Path,
    split: str = "train",
    rules: PackRules = RULES,
    skip_bad: bool = False,
    workers: int = 0,
    advance: Callable[[int, int], None] = lambda images, size: None,
) -> Packed:
    plan = planned(source, out, split, rules)
    pack_shards(plan, range(plan.shards), process_engine(workers), advance)
    return publish(plan, skip_bad)


def index_of(out: Path) -> ShardIndex:
    """The index that `mae pack` left beside the shards; it is not made here."""
    shards = expand([str(out)])
    folder = beside(shards)
    assert folder is not None
    return load(folder, shards)


def images_of(out: Path) -> list[bytes]:
    index = index_of(out)
    reader = ImageReader(index, NOWHERE, CACHE_BYTES)
    return [reader.read(place) for place in reader.locate(np.arange(len(index)))]


def contents(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file}  # type: ignore[union-attr]


def keys_of(out: Path) -> list[str]:
    return [name for tar in sorted(out.glob("*.tar")) for name in contents(tar) if not name.endswith(".cls")]


def packed_files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def statistics_of(images: list[bytes], channels: int) -> PixelStatistics:
    sums = PixelSums(channels)
    for image in images:
        sums.add(decode(image, channels))
    return sums.statistics()
