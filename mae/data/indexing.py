"""Lookup or construction of the index of a set of shards: parallel, and resumable after any crash."""

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from mae.data.index import ShardIndex, load, save, save_pixels
from mae.data.left_out import described, joined
from mae.data.manifest import ShardEntry, StaleIndexError, parse_entry, write_json
from mae.data.measuring import measure
from mae.data.read_rules import USUAL, ReadRules
from mae.data.scan import IMAGE_EXTENSIONS, RECORD, scan
from mae.data.store.download import download
from mae.data.store.errors import remedy_for
from mae.data.store.lock import lock
from mae.data.store.regular import read_json
from mae.data.store.shards import Shard, expand
from mae.data.store.unpacked import is_gzipped, plain_tar
from mae.data.tar import SYMBOLIC_LINKS
from mae.errors import UserError, first_of
from mae.files import read_bounded, write_atomically
from mae.output import counted
from mae.processes import end_with_parent
from mae.progress import progress_bar

FOLDER = ".mae-index"
"""Folder beside the shards, with one index for each set of shards."""
_PARTS = "parts"

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
    rules: ReadRules = USUAL,
) -> ShardIndex:
    """Return the index of the shards that `patterns` name: `expand`, then `index_of`."""
    return index_of(expand(patterns), cache_dir, folder, workers, say, rules)


def index_of(
    shards: Sequence[Shard],
    cache_dir: Path,
    folder: Path | None = None,
    workers: int = 1,
    say: Say = lambda text: None,
    rules: ReadRules = USUAL,
) -> ShardIndex:
    """Return the index of some shards; build it if no valid one exists.

    The index is in `folder` if that is given. Otherwise look beside the shards, where `mae pack` and `mae index` put
    it, then in `cache_dir`. A missing index is built in `cache_dir`, so that a data folder is not changed unasked.
    A bar shows the bytes of the finished shards meanwhile.

    Raises:
        UserError: for a damaged shard or one whose samples are unclear (see `scan`), if no shard has an image, or if
            the index cannot be written.
    """
    extension, in_cache = rules.image_extension, _in_cache(shards, cache_dir, rules)
    stale = ""
    for place in [folder] if folder else _usual_places(shards, cache_dir, rules):
        try:
            return load(place, shards, extension)
        except StaleIndexError as error:
            stale = f"; the one in {place} is not used: {error}" if os.path.lexists(place) else stale
    say(f"indexing {counted(len(shards), 'shard')}{stale}")
    with _locked(folder or in_cache) as place:
        try:
            return load(place, shards, extension)  # another process has built it meanwhile
        except StaleIndexError:
            with progress_bar("indexing", sum(shard.size for shard in shards), is_bytes=True) as advance:
                return _build(place, shards, cache_dir, workers, advance, rules)


def find_index(shards: Sequence[Shard], cache_dir: Path, rules: ReadRules = USUAL) -> ShardIndex | None:
    """Return the index of some shards if a valid one exists; none is built."""
    for place in _usual_places(shards, cache_dir, rules):
        with suppress(StaleIndexError):
            return load(place, shards, rules.image_extension)
    return None


def _usual_places(shards: Sequence[Shard], cache_dir: Path, rules: ReadRules) -> list[Path]:
    """Return the folders where the index of some shards may be, in the order in which they are tried."""
    near = beside(shards, rules.image_extension)
    return [*([near] if near else []), _in_cache(shards, cache_dir, rules)]


def _in_cache(shards: Sequence[Shard], cache_dir: Path, rules: ReadRules) -> Path:
    return cache_dir / "index" / _key("\0".join(map(_absolute, shards)), rules.image_extension)


def beside(shards: Sequence[Shard], image_extension: str | None = None) -> Path | None:
    """Return the folder of an index beside its shards; None if they are remote or in several folders."""
    folders = {None if shard.is_remote else Path(shard.url).parent for shard in shards}
    folder = folders.pop() if len(folders) == 1 else None
    return folder and folder / FOLDER / _key("\0".join(shard.name for shard in shards), image_extension)


def _absolute(shard: Shard) -> str:
    return str(shard) if shard.is_remote else str(Path(shard.url).resolve())


def _key(text: str, image_extension: str | None = None) -> str:
    text += f"\0\0{image_extension}" if image_extension else ""
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Lock the folder of an index against other processes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / "lock"):
            yield folder
    except OSError as error:
        remedy = remedy_for(error, "set data.index (mae index: --out)")
        raise UserError(f"the index cannot be written to {folder}: {error.strerror or error}; {remedy}") from None


def _build(
    folder: Path, shards: Sequence[Shard], cache_dir: Path, workers: int, advance: Advance, rules: ReadRules
) -> ShardIndex:
    parts = folder / _PARTS
    parts.mkdir(exist_ok=True)
    entries, errors = [], []
    read = partial(_read_shard, parts, cache_dir, rules)
    for shard, (entry, error) in zip(shards, _map_parallel(read, shards, workers), strict=True):
        advance(shard.size)
        if entry:
            entries.append(entry)
        else:
            errors.append(error)
    if errors:
        more = f"; {len(errors)} of {len(shards)} shards have errors" if len(errors) > 1 else ""
        raise UserError(first_of(errors) + more)
    if not any(entry.samples for entry in entries):
        raise UserError(_no_images(entries, rules.image_extension))
    _require_one_kind_of_image(entries)
    save(folder, entries, [_part(parts, shard, rules) for shard in shards], rules.image_extension)
    index = load(folder, shards, rules.image_extension)
    index = save_pixels(index, *measure(index, cache_dir, rules.cache_bytes))
    shutil.rmtree(parts)
    return index


def _require_one_kind_of_image(entries: Sequence[ShardEntry]) -> None:
    """Refuse a shard whose images are the side files of another shard: `b.seg.png` where all `b.jpg` are missing."""
    sides = {extension: entry for entry in entries for extension in entry.extensions if "." in extension}
    for entry in entries:
        for extension, other in sides.items():
            if entry.last_dot.lower().endswith(f".{extension}"):
                raise UserError(
                    f"shard {entry.shard} has no image but .{extension} files, the first: {entry.last_dot}; in shard "
                    f"{other.shard} they lie beside the images; leave that shard out, or pack it again with its images"
                )


def _no_images(entries: Sequence[ShardEntry], image_extension: str | None) -> str:
    left_out = joined((str(entry.shard), entry.left_out) for entry in entries)
    parts = [f"shard {entries[0].shard} has no images" + f", nor has any of the {len(entries)}" * (len(entries) > 1)]
    parts += [f"an image is a file .{image_extension or ', .'.join(IMAGE_EXTENSIONS)}"]
    parts += [f"left out: {described(left_out)}"] if left_out else []
    parts += ["tar --dereference stores the files instead of links to them"] if SYMBOLIC_LINKS in left_out else []
    return "; ".join(parts)


def _read_shard(parts: Path, cache_dir: Path, rules: ReadRules, shard: Shard) -> tuple[ShardEntry | None, str]:
    """Return the entry of one shard, from the part that an interrupted build left or from the shard; or an error."""
    part = _part(parts, shard, rules)
    if (entry := _read_part(part, shard)) is not None:
        return entry, ""
    try:
        with local_copy(shard, cache_dir, rules.cache_bytes) as source:
            found = scan(source, str(shard), rules.image_extension)
    except UserError as error:
        return None, str(error)
    entry, records = ShardEntry.of(shard, found), found.records.tobytes()
    write_atomically(part, records)
    write_json(part.with_suffix(".json"), asdict(entry) | {"records_crc32": zlib.crc32(records)})
    return entry, ""


def _read_part(part: Path, shard: Shard) -> ShardEntry | None:
    """Return the entry of a part that is whole and belongs to `shard`, else None."""
    try:
        values = read_json(part.with_suffix(".json"))
        crc32 = values.pop("records_crc32")
        entry = parse_entry(values)
        records = read_bounded(part, entry.samples * RECORD.itemsize)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or cut off by a crash
    is_whole = (len(records), zlib.crc32(records)) == (entry.samples * RECORD.itemsize, crc32)
    return entry if is_whole and (entry.url, entry.size, entry.version) == (str(shard), *shard[1:]) else None


def _part(parts: Path, shard: Shard, rules: ReadRules) -> Path:
    place = shard.url if shard.is_remote else _absolute(shard)
    return parts / f"{_key(f'{place} {shard.size} {shard.version}', rules.image_extension)}.bin"


@contextmanager
def local_copy(shard: Shard, cache_dir: Path, cache_bytes: float) -> Iterator[Path | int]:
    """Give a plain tar on this machine: the shard itself, its unpacked copy, or an unnamed temporary download."""
    if not shard.is_remote or is_gzipped(shard):
        yield plain_tar(shard, cache_dir, cache_bytes)
        return
    folder = cache_dir / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            download(shard, file)
            file.flush()
            yield file.fileno()
    except OSError as error:
        remedy = remedy_for(error, "set data.cache_dir to another folder")
        raise UserError(f"{shard} cannot be copied to {folder}: {error.strerror or error}; {remedy}") from None


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
