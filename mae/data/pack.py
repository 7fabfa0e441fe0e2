"""Pack images into WebDataset shards: original bytes, labels, a class list, counts and pixel statistics."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset import ShardWriter

from mae import keyed
from mae.data.decode import decode, is_gray, native_channels
from mae.data.index import IMAGE_EXTENSIONS, LABEL_EXTENSION, NO_LABEL, grouped, read_samples
from mae.data.shards import expand, plain_tar
from mae.data.statistics import INFO_FILE, PixelStatistics, PixelSums, read_info
from mae.data.tar import members
from mae.errors import BadImageError, UserError, first_of
from mae.keyed import Purpose

CLASSES_FILE, BAD_FILE = "classes.txt", "bad-images.txt"
# File names need not be UTF-8; what Python makes of their bytes is written as those bytes.
_NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}
# timm looks for jpg, png and webp only.
_PACKED_EXTENSION = {"jpeg": "jpg"}
_CHUNK = 64


class Extent(NamedTuple):
    """Bytes of a file: `size` from `offset`, or all of it where `size` is None."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Item(NamedTuple):
    """One image to pack."""

    name: str
    """Where it comes from, for messages and provenance."""
    extension: str
    image: Extent | bytes
    label: int = NO_LABEL
    side_files: tuple[tuple[str, Extent], ...] = ()


@dataclass(frozen=True)
class Source:
    """What there is to pack."""

    items: Sequence[Item]
    classes: tuple[str, ...] = ()
    """Names in label order; empty without labels or without names."""
    ignored: tuple[str, ...] = ()
    """Files that are no images."""


@dataclass
class Packed:
    """What was packed."""

    filenames: list[str] = field(default_factory=list)
    shard_lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    statistics: PixelStatistics | None = None

    @property
    def samples(self) -> int:
        """Images written."""
        return sum(self.shard_lengths)


def find_images(source: str, cache_dir: Path, known_classes: Sequence[str] = ()) -> Source:
    """List the images of a labelled tree (`class/image`), a flat folder, or existing shards.

    Labels are the places of the class folders' names in `known_classes`, or, if that is empty, in their
    alphabetical order.

    Raises:
        UserError: if there is nothing to pack, a tree mixes both layouts, or a class is not known.
    """
    root = Path(source)
    if not root.is_dir() or any(p.name.endswith((".tar", ".tar.gz", ".tgz")) for p in root.iterdir()):
        return _from_shards(source, cache_dir, known_classes)
    files = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root)))
    images = [p for p in files if _is_image(p)]
    ignored = tuple(str(p.relative_to(root)) for p in files if not _is_image(p))
    if not images:
        raise UserError(f"{source} holds no image (.{', .'.join(IMAGE_EXTENSIONS)})")
    flat = [p for p in images if p.parent == root]
    if flat and len(flat) < len(images):
        raise UserError(
            f"{source} mixes {len(flat)} images beside {len(images) - len(flat)} in folders (the first is "
            f"{flat[0].name}); give either class/image or one flat folder"
        )
    if flat:
        return Source([_item(p, root, NO_LABEL) for p in images], ignored=ignored)
    names = sorted({p.relative_to(root).parts[0] for p in images})
    unknown = [name for name in names if known_classes and name not in known_classes]
    if unknown:
        raise UserError(
            f"{source} has classes that the packed {CLASSES_FILE} does not list: {', '.join(unknown[:5])}; "
            "pack splits of the same classes into one folder"
        )
    classes = tuple(known_classes) or tuple(names)
    number = {name: label for label, name in enumerate(classes)}
    return Source([_item(p, root, number[p.relative_to(root).parts[0]]) for p in images], classes, ignored)


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order keyed by `seed`, so that every shard holds a mixture of the classes."""
    words = keyed.bits(keyed.key(Purpose.PACK, seed), np.arange(len(items)), 1)[:, 0]
    return [items[i] for i in np.argsort(words, kind="stable").tolist()]


def write_split(
    items: Sequence[Item],
    out: Path,
    split: str,
    classes: Sequence[str],
    shard_samples: int,
    shard_bytes: float,
    provenance: bool,
    skip_bad: bool,
    workers: int,
    advance: Callable[[int], None],
) -> Packed:
    """Write the shards `split-000000.tar` ... into `out` and enter the split into `_info.json`.

    Every image is decoded once, to find the bad ones and to measure mean and std. Nothing appears under
    its name before all of it is written. `advance` is told how many images are done.

    Raises:
        UserError: if the split is there already, or images are bad and `skip_bad` is off.
    """
    info = read_info(out)
    if split in info.get("splits", {}) or list(out.glob(f"{split}-[0-9]*.tar")):
        raise UserError(f"{out} holds a split {split!r} already; give another --split or another --out")
    part = out / f".{split}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    try:
        packed = _write_shards(items, part, split, shard_samples, shard_bytes, provenance, workers, advance)
        if packed.bad and not skip_bad:
            raise UserError(
                f"{len(packed.bad)} of {len(items)} images are bad: {first_of(packed.bad)}; nothing was packed. "
                "Repair them, or leave them out with --skip_bad True"
            )
        if not packed.samples:
            raise UserError("no image could be packed: all are bad")
        for name in packed.filenames:
            (part / name).rename(out / name)
        if packed.bad:
            _write_lines(out / f"{split}-{BAD_FILE}", packed.bad)
        if classes:
            _write_lines(out / CLASSES_FILE, classes)
        _write_info(out, info, split, packed)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return packed


def known_classes(out: Path) -> tuple[str, ...]:
    """The class list of a folder of shards; empty if there is none."""
    path = out / CLASSES_FILE
    return tuple(filter(None, path.read_text(**_NAMES).split("\n"))) if path.exists() else ()


def _from_shards(source: str, cache_dir: Path, known: Sequence[str]) -> Source:
    shards = expand([source])
    classes = known_classes(shards[0].parent)
    if known and classes and tuple(known) != classes:
        raise UserError(
            f"{shards[0].parent / CLASSES_FILE} and the packed {CLASSES_FILE} list different classes; "
            "pack splits of the same classes into one folder"
        )
    items: list[Item] = []
    for shard in shards:
        tar = plain_tar(shard, cache_dir)
        samples = {sample.key: sample for sample in read_samples(tar, shard)}
        for key, group in grouped(members(tar)):
            sample = samples[key]
            side = tuple(
                (extension, Extent(tar, member.offset, member.size))
                for extension, member in group.items()
                if extension not in (sample.extension, LABEL_EXTENSION)
            )
            image = Extent(tar, sample.offset, sample.size)
            items.append(Item(f"{shard.name}/{key}", sample.extension, image, sample.label, side))
    return Source(items, classes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _item(path: Path, root: Path, label: int) -> Item:
    extension = path.suffix.lower().removeprefix(".")
    return Item(str(path.relative_to(root)), extension, Extent(path), label)


class _Read(NamedTuple):
    """One image as a worker read and measured it."""

    item: Item
    files: dict[str, bytes]
    sums: PixelSums | None
    gray: bool
    error: str


def _read_chunk(items: Sequence[Item]) -> list[_Read]:
    return [_read(item) for item in items]


def _read(item: Item) -> _Read:
    try:
        data = item.image if isinstance(item.image, bytes) else item.image.read()
        pixels = decode(data, native_channels(data))
        extension = _PACKED_EXTENSION.get(item.extension, item.extension)
        files = {extension: data} | {name: extent.read() for name, extent in item.side_files}
    except (BadImageError, OSError) as error:
        return _Read(item, {}, None, False, f"{item.name} ({error})")
    sums = PixelSums(len(pixels))
    sums.add(pixels)
    return _Read(item, files, sums, is_gray(data), "")


def _read_all(items: Sequence[Item], workers: int) -> Iterator[_Read]:
    """All items in order, read ahead by `workers` processes, a bounded number of chunks at a time."""
    chunks = _chunks(items)
    if workers == 0:
        for chunk in chunks:
            yield from _read_chunk(chunk)
        return
    with ProcessPoolExecutor(workers) as pool:
        pending: deque[Future[list[_Read]]] = deque(
            pool.submit(_read_chunk, chunk) for chunk in islice(chunks, 2 * workers)
        )
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(_read_chunk, chunk) for chunk in islice(chunks, 1))
            yield from done


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _write_shards(
    items: Sequence[Item],
    folder: Path,
    split: str,
    shard_samples: int,
    shard_bytes: float,
    provenance: bool,
    workers: int,
    advance: Callable[[int], None],
) -> Packed:
    packed, sums, all_gray = Packed(), dict[int, PixelSums](), True
    shard = _ShardFile()
    writer = ShardWriter(
        f"{str(folder).replace('%', '%%')}/{split}-%06d.tar",
        maxcount=shard_samples,
        maxsize=shard_bytes,
        verbose=0,
        encoder=False,
        mtime=0,
        opener=shard.open,
        post=shard.close,
    )
    with writer:
        for read in _read_all(items, workers):
            advance(1)
            if read.sums is None:
                packed.bad.append(read.error)
                continue
            writer.write(_sample(read, packed.samples, provenance))
            _count(packed, Path(writer.fname).name, read.item.label)
            channels = len(read.sums.total)
            sums.setdefault(channels, PixelSums(channels)).merge(read.sums)
            all_gray = all_gray and read.gray
    if len(sums) == 1:
        ((channels, total),) = sums.items()
        statistics = total.statistics()
        gray = all_gray and channels == 3
        packed.statistics = PixelStatistics(statistics.mean[:1], statistics.std[:1]) if gray else statistics
    return packed


class _ShardFile:
    """The shard being written. webdataset's own opener would run a shell for names such as `pipe:...`;
    and it leaves files it has not opened to the garbage collector.
    """

    def open(self, path: str) -> BinaryIO:
        self._file = Path(path).open("wb")  # noqa: SIM115 (closed by `close`)
        return self._file

    def close(self, _: str) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _sample(read: _Read, number: int, provenance: bool) -> dict[str, Any]:
    sample: dict[str, Any] = {"__key__": f"{number:09d}", **read.files}
    if read.item.label != NO_LABEL:
        sample[LABEL_EXTENSION] = str(read.item.label).encode()
    if provenance:
        if "json" in sample:
            raise UserError(f"{read.item.name} has a .json file already; pack it without --provenance")
        sample["json"] = json.dumps({"source": read.item.name}).encode()
    return sample


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", **_NAMES)


def _count(packed: Packed, filename: str, label: int) -> None:
    if not packed.filenames or packed.filenames[-1] != filename:
        packed.filenames.append(filename)
        packed.shard_lengths.append(0)
    packed.shard_lengths[-1] += 1
    packed.labels.append(label)


def _write_info(out: Path, info: dict[str, Any], split: str, packed: Packed) -> None:
    """timm reads `splits`; mean, std and counts stand beside what it looks for."""
    entry: dict[str, Any] = {
        "name": split,
        "num_samples": packed.samples,
        "filenames": packed.filenames,
        "shard_lengths": packed.shard_lengths,
    }
    labels: NDArray[np.int64] = np.array(packed.labels)
    if (labels != NO_LABEL).all():
        entry["samples_per_class"] = np.bincount(labels).tolist()
    if packed.statistics is not None:
        entry |= {"mean": list(packed.statistics.mean), "std": list(packed.statistics.std)}
    info.setdefault("splits", {})[split] = entry
    part = out / f".{INFO_FILE}.part"
    part.write_text(json.dumps(info, indent=1), encoding="utf-8")
    part.rename(out / INFO_FILE)


def default_workers() -> int:
    """One process per core that this process may use."""
    return len(os.sched_getaffinity(0))
