"""Lookup or construction of the index of a set of shards: parallel, and resumable after any crash."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mae.data.images.decode import decode, is_gray, native_channels
from mae.data.index import (
    ShardEntry,
    ShardIndex,
    StaleIndexError,
    load,
    parse_entry,
    read_json,
    save,
    save_pixels,
    write_json,
)
from mae.data.reader import ImageReader
from mae.data.scan import RECORD, scan
from mae.data.statistics import PixelStatistics, SetPixels
from mae.data.store.download import download
from mae.data.store.lock import lock
from mae.data.store.shards import Shard, expand, is_gzipped, plain_tar
from mae.errors import BadImageError, UserError, first_of
from mae.files import flush
from mae.processes import end_with_parent

FOLDER = ".mae-index"
"""Folder beside the shards, with one index for each set of shards."""
_PARTS = "parts"
_MAX_MEASURED = 2000
_BLOCK_IMAGES = 256

Task = TypeVar("Task")
Result = TypeVar("Result")

Say = Callable[[str], None]
Advance = Callable[[int], None]


def open_index(
    patterns: Sequence[str],
    cache_dir: Path,
    folder: Path | None = None,
    workers: int = 1,
    say: Say = lambda text: None,
    advance: Advance = lambda size: None,
) -> ShardIndex:
    """Return the index of the shards that `patterns` name: `expand`, then `index_of`."""
    return index_of(expand(patterns), cache_dir, folder, workers, say, advance)


def index_of(
    shards: Sequence[Shard],
    cache_dir: Path,
    folder: Path | None = None,
    workers: int = 1,
    say: Say = lambda text: None,
    advance: Advance = lambda size: None,
) -> ShardIndex:
    """Return the index of some shards; build it if no valid one exists.

    The index is in `folder` if that is given. Otherwise look beside the shards, where `mae pack` and `mae index` put
    it, then in `cache_dir`. A missing index is built in `cache_dir`, so that a data folder is not changed unasked.
    `advance` receives the bytes of each finished shard.

    Raises:
        UserError: for a damaged or empty shard, a key that occurs twice in a shard, a label that is not an integer
            >= 0, or if the index cannot be written.
    """
    in_cache = cache_dir / "index" / _key("\0".join(map(_absolute, shards)))
    stale = ""
    for place in [folder] if folder else [beside(shards), in_cache]:
        if place is None:
            continue
        try:
            return load(place, shards)
        except StaleIndexError as error:
            stale = f"; the one in {place} is not used: {error}" if place.exists() else stale
    say(f"indexing {len(shards)} shards{stale}")
    with _locked(folder or in_cache) as place:
        try:
            return load(place, shards)  # another process has built it meanwhile
        except StaleIndexError:
            return _build(place, shards, cache_dir, workers, advance)


def beside(shards: Sequence[Shard]) -> Path | None:
    """Return the folder of an index beside its shards; None if they are remote or in several folders."""
    folders = {None if shard.is_remote else Path(shard.url).parent for shard in shards}
    folder = folders.pop() if len(folders) == 1 else None
    return folder and folder / FOLDER / _key("\0".join(shard.name for shard in shards))


def check_images(index: ShardIndex, cache_dir: Path, workers: int, advance: Advance) -> tuple[SetPixels, list[str]]:
    """Verify and decode every image; return the pixel sums of the good images, and the bad images with reasons.

    `advance` receives the number of images that have just been checked.
    """
    pixels, bad = SetPixels(), list[str]()
    for found, wrong in DataLoader(
        _ImageChecks(ImageReader(index, cache_dir)),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,  # type: ignore[arg-type]
    ):
        pixels.merge(found)
        bad += wrong
        advance(found.images + len(wrong))
    return pixels, bad


class _ImageChecks(Dataset[tuple[SetPixels, list[str]]]):
    """Data set of checked blocks of images: the pixel sums of a block, and its bad images."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return math.ceil(len(self._reader.index) / _BLOCK_IMAGES)

    def __getitem__(self, number: int) -> tuple[SetPixels, list[str]]:
        start = number * _BLOCK_IMAGES
        ids = np.arange(start, min(start + _BLOCK_IMAGES, len(self._reader.index)))
        return _decode_images(self._reader, ids, tolerated=UserError)


def _unchanged(item: tuple[SetPixels, list[str]]) -> tuple[SetPixels, list[str]]:
    return item


def _absolute(shard: Shard) -> str:
    return str(shard) if shard.is_remote else str(Path(shard.url).resolve())


def _key(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Lock the folder of an index against other processes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / "lock"):
            yield folder
    except OSError as error:
        raise UserError(f"the index cannot be written to {folder}: {error.strerror}; set data.index") from None


def _build(folder: Path, shards: Sequence[Shard], cache_dir: Path, workers: int, advance: Advance) -> ShardIndex:
    parts = folder / _PARTS
    parts.mkdir(exist_ok=True)
    entries, errors = [], []
    read = partial(_read_shard, parts, cache_dir)
    for shard, (entry, error) in zip(shards, _map_parallel(read, shards, workers), strict=True):
        advance(shard.size)
        if entry:
            entries.append(entry)
        else:
            errors.append(error)
    if errors:
        more = f"; {len(errors)} of {len(shards)} shards have errors" if len(errors) > 1 else ""
        raise UserError(first_of(errors) + more)
    save(folder, entries, [_part(parts, shard) for shard in shards])
    index = load(folder, shards)
    index = save_pixels(index, *measure(index, cache_dir))
    shutil.rmtree(parts)
    return index


def measure(index: ShardIndex, cache_dir: Path, channels: int | None = None) -> tuple[PixelStatistics | None, int]:
    """Measure mean and standard deviation on at most 2,000 evenly spaced images; also return their number.

    Decode into `channels` planes or, if that is None, into the native number. Skip bad images; a later read reports
    them.
    """
    some = np.unique(np.linspace(0, len(index) - 1, _MAX_MEASURED).astype(np.int64))
    # With chunks of one sample, only these images of a remote shard are fetched, not their neighbours.
    pixels, _ = _decode_images(ImageReader(index, cache_dir, chunk_samples=1), some, channels)
    return pixels.statistics(), pixels.images


def _read_shard(parts: Path, cache_dir: Path, shard: Shard) -> tuple[ShardEntry | None, str]:
    """Return the entry of one shard, from the part that an interrupted build left or from the shard; or an error."""
    part = _part(parts, shard)
    try:
        entry = parse_entry(read_json(part.with_suffix(".json")))
        if part.stat().st_size == entry.samples * RECORD.itemsize:
            return entry, ""
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, or cut off by the crash: read the shard
    try:
        with local_copy(shard, cache_dir) as source:
            found = scan(source, str(shard))
    except UserError as error:
        return None, str(error)
    entry = ShardEntry.of(shard, found)
    with part.open("wb") as file:
        found.records.tofile(file)
        flush(file)
    write_json(part.with_suffix(".json"), asdict(entry))
    return entry, ""


def _part(parts: Path, shard: Shard) -> Path:
    return parts / f"{_key(f'{_absolute(shard)} {shard.size} {shard.version}')}.bin"


@contextmanager
def local_copy(shard: Shard, cache_dir: Path) -> Iterator[Path | int]:
    """Give a plain tar on this machine: the shard itself, its unpacked copy, or an unnamed temporary download."""
    if not shard.is_remote or is_gzipped(shard):
        yield plain_tar(shard, cache_dir)
        return
    folder = cache_dir / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        download(shard, file)
        file.flush()
        yield file.fileno()


def _decode_images(
    reader: ImageReader, ids: NDArray[np.int64], channels: int | None = None, tolerated: type[Exception] = BadImageError
) -> tuple[SetPixels, list[str]]:
    """Return the pixel sums of the good images, and the bad ones, which raise `BadImageError` or `tolerated`."""
    pixels, bad = SetPixels(), list[str]()
    reader.will_need(ids)
    for place in reader.locate(ids):
        try:
            data = reader.read(place)
            image = decode(data, channels or native_channels(data))
        except (BadImageError, tolerated) as error:
            bad.append(f"{reader.name(place.sample_id)} ({error})")
        else:
            pixels.add(image, is_gray=channels is None and is_gray(data))
    return pixels, bad


def _map_parallel(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield the results of `work` in the order of `tasks`, computed by at most `workers` processes."""
    if min(workers, len(tasks)) <= 1:
        yield from map(work, tasks)
        return
    try:
        with ProcessPoolExecutor(min(workers, len(tasks)), initializer=end_with_parent) as pool:
            yield from pool.map(work, tasks)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, probably because memory ran out; run the same command again: it keeps the "
            "finished shards"
        ) from None
