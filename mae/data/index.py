"""Index of a set of shards: the position of every sample, known before training starts.

The *sample id* is the number of a sample in the list of all samples of all shards, in order. An index is a folder
with two files. `samples.bin` has one `scan.RECORD` for each sample and is mapped into memory. `manifest.json`
describes each shard as it was when it was read. Nothing in an index is unpickled.
"""

import json
import platform
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae import __version__
from mae.data.scan import LABEL_EXTENSION, NO_LABEL, RECORD, Records, ShardScan
from mae.data.statistics import PixelStatistics
from mae.data.store.shards import Shard
from mae.errors import UserError
from mae.files import flush, write_atomically

FORMAT = 1
"""Version of the files; increase it when their meaning changes. An index of another version is built again."""
_MANIFEST, _RECORDS = "manifest.json", "samples.bin"
_BLOCK_BYTES = 1 << 24
# 178 million samples; each GiB takes about half a second on one core.
_MAX_VERIFIED_BYTES = 4 << 30


class StaleIndexError(Exception):
    """Reason why an index on disk cannot be used: missing, damaged, of another format, or the shards have changed."""


@dataclass(frozen=True)
class ShardEntry:
    """Description of a shard as it was when it was read."""

    url: str
    """Path or URL; a stored index has it without secrets."""
    size: int
    """Size in bytes."""
    version: str
    """Version of the content: modification time or ETag."""
    samples: int
    digest: str
    """sha256 of the names, positions, contents and labels of its samples."""
    extensions: dict[str, int]
    ignored: int
    bad: tuple[str, ...]
    without_image: tuple[str, ...]

    @classmethod
    def of(cls, shard: Shard, found: ShardScan) -> "ShardEntry":
        """Return the entry of a shard that has just been scanned."""
        return cls(
            url=str(shard),
            size=shard.size,
            version=shard.version,
            samples=len(found.records),
            digest=found.digest,
            extensions=found.extensions,
            ignored=found.ignored,
            bad=found.bad,
            without_image=found.without_image,
        )

    @property
    def shard(self) -> Shard:
        """Shard with the size and version that it had when it was read."""
        return Shard(self.url, self.size, self.version)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Samples of a list of shards, with the ids 0 to `len(index) - 1`."""

    folder: Path
    """Folder that holds the index."""
    entries: tuple[ShardEntry, ...]
    """Shards in order."""
    records: Records = field(repr=False)
    """Array [samples] of `RECORD`, mapped from disk."""
    pixels: PixelStatistics | None
    """Mean and standard deviation of the decoded images; None if their numbers of channels differ."""
    pixels_of: int
    """Number of images that `pixels` was measured on."""
    fingerprint: str
    """sha256 of the names, positions, contents and labels of all samples; independent of the shards' location."""

    starts: NDArray[np.int64] = field(init=False, repr=False)
    """First sample id of each shard, and the number of samples: int64 [shards + 1]."""

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *(entry.samples for entry in self.entries)])
        object.__setattr__(self, "starts", starts)

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle an index without its records; the other process maps the same file."""
        return _mapped_again, (self.folder, self.entries, len(self), self.pixels, self.pixels_of, self.fingerprint)

    @property
    def label(self) -> NDArray[np.int64]:
        """Label of each sample, or `NO_LABEL`: int64 [samples]."""
        labels: NDArray[np.int64] = self.records["label"]
        return labels

    def shard_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the shard of each sample: int64 [ids]."""
        shards: NDArray[np.int64] = np.searchsorted(self.starts, sample_ids, side="right") - 1
        return shards

    def class_count(self) -> int:
        """Return the greatest label plus one.

        Raises:
            UserError: if samples have no label; it names the first.
        """
        unlabelled = np.flatnonzero(self.label == NO_LABEL)
        if len(unlabelled):
            (shard,) = self.shard_of(unlabelled[:1])
            number = int(unlabelled[0] - self.starts[shard])
            raise UserError(
                f"{len(unlabelled)} of {len(self)} samples have no .{LABEL_EXTENSION} label; the first is image number "
                f"{number} of {self.entries[shard].shard}; fine-tuning needs a label for each image"
            )
        return int(self.label.max()) + 1

    def bad(self) -> list[str]:
        """Return the images whose first bytes show that they cannot be decoded: `shard: key.jpg (reason)`."""
        return [f"{entry.shard}: {name}" for entry in self.entries for name in entry.bad]

    def without_image(self) -> list[str]:
        """Return the keys that have files but no image: `shard: key`."""
        return [f"{entry.shard}: {key}" for entry in self.entries for key in entry.without_image]


def save(folder: Path, entries: Sequence[ShardEntry], parts: Sequence[Path]) -> None:
    """Join the records of the shards, one file of `parts` for each, into an index; write the manifest last."""
    joined, crc32 = folder / f".{_RECORDS}.part", 0
    with joined.open("wb") as file:
        for block in chain.from_iterable(map(_blocks, parts)):
            crc32 = zlib.crc32(block, crc32)
            file.write(block)
        flush(file)
    manifest = {
        "format": FORMAT,
        "samples": sum(entry.samples for entry in entries),
        "fingerprint": fingerprint(entries),
        "records_crc32": crc32,
        "mean": None,
        "std": None,
        "pixels_of": 0,
        "made_by": {"mae": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "shards": [asdict(entry) for entry in entries],
    }
    # After a crash between the two renames, the checksum in the old manifest refuses the new records.
    joined.rename(folder / _RECORDS)
    _write_manifest(folder, manifest)


def save_pixels(index: ShardIndex, pixels: PixelStatistics | None, images: int) -> ShardIndex:
    """Store the mean and standard deviation, measured on `images` images, in the index; return the new index."""
    manifest, _ = _read_manifest(index.folder)
    found = {"mean": pixels and pixels.mean, "std": pixels and pixels.std, "pixels_of": images}
    _write_manifest(index.folder, manifest | found)
    return replace(index, pixels=pixels, pixels_of=images)


def load(folder: Path, shards: Sequence[Shard]) -> ShardIndex:
    """Load the index in `folder`, which must be intact and describe `shards` as they are now.

    Raises:
        StaleIndexError: if the index is missing or damaged, or if the shards have changed.
    """
    manifest, stored = _read_manifest(folder)
    _require_same_shards(stored, shards)
    entries = tuple(replace(entry, url=shard.url) for entry, shard in zip(stored, shards, strict=True))
    records = _map_records(folder / _RECORDS, manifest["samples"], manifest["records_crc32"])
    mean, std = manifest["mean"], manifest["std"]
    return ShardIndex(
        folder=folder,
        entries=entries,
        records=records,
        pixels=PixelStatistics(tuple(mean), tuple(std)) if mean else None,
        pixels_of=manifest["pixels_of"],
        fingerprint=manifest["fingerprint"],
    )


def fingerprint(entries: Sequence[ShardEntry]) -> str:
    """Return a hash of the samples and their order; it does not depend on the location of the shards."""
    return sha256("".join(entry.digest for entry in entries).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a JSON mapping.
    """
    value = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON mapping")
    return value


def parse_entry(value: dict[str, Any]) -> ShardEntry:
    """Build a shard's entry from its JSON mapping."""
    return ShardEntry(**value | {"bad": tuple(value["bad"]), "without_image": tuple(value["without_image"])})


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / _MANIFEST, manifest | {"sha256": _seal(manifest)})


def _seal(manifest: dict[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> tuple[dict[str, Any], tuple[ShardEntry, ...]]:
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["format"] != FORMAT:
            raise StaleIndexError(f"it has format {manifest['format']}, but this version needs format {FORMAT}")
        if manifest.pop("sha256") != _seal(manifest):
            raise StaleIndexError(f"{_MANIFEST} is damaged: its sha256 has changed since it was written")
        entries = tuple(parse_entry(value) for value in manifest["shards"])
    except FileNotFoundError:
        raise StaleIndexError("there is no index") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StaleIndexError(f"{_MANIFEST} is damaged: {error}") from None
    return manifest, entries


def _require_same_shards(entries: Sequence[ShardEntry], shards: Sequence[Shard]) -> None:
    if len(entries) != len(shards):
        raise StaleIndexError(f"it lists {len(entries)} shards, but there are {len(shards)}")
    for entry, shard in zip(entries, shards, strict=True):
        for what, old, new in (
            ("name", entry.shard.name, shard.name),
            ("size", entry.size, shard.size),
            ("version", entry.version, shard.version),
        ):
            if old != new:
                raise StaleIndexError(f"{shard} has changed: its {what} was {old} and is now {new}")


def _mapped_again(folder: Path, entries: tuple[ShardEntry, ...], samples: int, *rest: Any) -> ShardIndex:
    return ShardIndex(folder, entries, _map_records(folder / _RECORDS, samples), *rest)


def _map_records(path: Path, samples: int, crc32: int | None = None) -> Records:
    """Map the records into memory; compare them with `crc32` if it is given and the file is not too large.

    In a larger file a damaged record is found when its image is read and compared with the image's own crc32.
    """
    try:
        present = path.stat().st_size
        if present != samples * RECORD.itemsize:
            raise StaleIndexError(f"{path.name} has {present} bytes instead of {samples * RECORD.itemsize}")
        if crc32 is not None and present <= _MAX_VERIFIED_BYTES:
            found = 0
            for block in _blocks(path):
                found = zlib.crc32(block, found)
            if found != crc32:
                raise StaleIndexError(f"{path.name} is damaged: its crc32 is {found:08x}, not {crc32:08x}")
        return np.memmap(path, dtype=RECORD, mode="r", shape=(samples,))
    except OSError as error:
        raise StaleIndexError(f"{path.name} cannot be read: {error.strerror}") from None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
