"""The index: where every sample of a set of shards lies, known before training starts.

Its *sample id* is a sample's place in the list of all samples of all shards, in order. An index is a folder:
`samples.bin`, one record of `scan.RECORD` a sample, mapped into memory, never read whole; and `manifest.json`,
which tells what each shard was when it was read. Nothing in it is ever unpickled.
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
"""Raised when a file's meaning changes; indexes of another format are made anew."""
_MANIFEST, _RECORDS = "manifest.json", "samples.bin"
_PIECE = 1 << 24
# Bytes: 178 million samples, half a second on one core or so for each gigabyte.
_VERIFIED_AT_MOST = 4 << 30


class StaleIndexError(Exception):
    """Why an index on disk does not describe the shards: it is cut, damaged, of another format, or they changed."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was when it was read."""

    url: str
    """Path or URL; without its secrets in a stored index."""
    size: int
    """Bytes."""
    version: str
    """Of the content: time of modification or ETag."""
    samples: int
    digest: str
    """sha256 over the names, places, contents and labels of its samples."""
    extensions: dict[str, int]
    ignored: int
    bad: tuple[str, ...]
    without_image: tuple[str, ...]

    @classmethod
    def of(cls, shard: Shard, found: ShardScan) -> "ShardEntry":
        """The entry of a shard that has just been read."""
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
        """What the shard must still be."""
        return Shard(self.url, self.size, self.version)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """All samples of a list of shards; `len(index)` samples with the ids 0 ... len - 1."""

    folder: Path
    """Where it is stored."""
    entries: tuple[ShardEntry, ...]
    """The shards, in order."""
    records: Records = field(repr=False)
    """[samples] of `RECORD`, mapped from disk."""
    pixels: PixelStatistics | None
    """Mean and standard deviation of the decoded images; None if they have different numbers of channels."""
    pixels_of: int
    """Images that `pixels` was measured on."""
    fingerprint: str
    """sha256 over the names, places, contents and labels of all samples, wherever the shards lie."""

    starts: NDArray[np.int64] = field(init=False, repr=False)
    """[shards + 1] sample id with which each shard begins."""

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *(entry.samples for entry in self.entries)])
        object.__setattr__(self, "starts", starts)

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[object, ...]:
        """Other processes map the same file."""
        return _mapped_again, (self.folder, self.entries, len(self), self.pixels, self.pixels_of, self.fingerprint)

    @property
    def label(self) -> NDArray[np.int64]:
        """[samples] class, or `NO_LABEL`."""
        labels: NDArray[np.int64] = self.records["label"]
        return labels

    def shard_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the shards that hold these samples."""
        shards: NDArray[np.int64] = np.searchsorted(self.starts, sample_ids, side="right") - 1
        return shards

    def class_count(self) -> int:
        """One more than the greatest label.

        Raises:
            UserError: naming the first sample without a label.
        """
        unlabelled = np.flatnonzero(self.label == NO_LABEL)
        if len(unlabelled):
            (shard,) = self.shard_of(unlabelled[:1])
            number = int(unlabelled[0] - self.starts[shard])
            raise UserError(
                f"{len(unlabelled)} of {len(self)} samples have no .{LABEL_EXTENSION} label, the first is image number "
                f"{number} of {self.entries[shard].shard}; fine-tuning needs one for each image"
            )
        return int(self.label.max()) + 1

    def bad(self) -> list[str]:
        """Images whose first bytes show that they cannot be decoded: `shard: key.jpg (reason)`."""
        return [f"{entry.shard}: {name}" for entry in self.entries for name in entry.bad]

    def without_image(self) -> list[str]:
        """Keys that have files but no image: `shard: key`."""
        return [f"{entry.shard}: {key}" for entry in self.entries for key in entry.without_image]


def save(folder: Path, entries: Sequence[ShardEntry], parts: Sequence[Path]) -> None:
    """Join the records of the shards, one file of `parts` each, into an index; the manifest appears last."""
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
    # A crash between the renames leaves records that the manifest's checksum refuses.
    joined.rename(folder / _RECORDS)
    _write_manifest(folder, manifest)


def save_pixels(index: ShardIndex, pixels: PixelStatistics | None, images: int) -> ShardIndex:
    """Store mean and standard deviation, measured on so many images, with the index."""
    manifest, _ = _read_manifest(index.folder)
    found = {"mean": pixels and pixels.mean, "std": pixels and pixels.std, "pixels_of": images}
    _write_manifest(index.folder, manifest | found)
    return replace(index, pixels=pixels, pixels_of=images)


def load(folder: Path, shards: Sequence[Shard]) -> ShardIndex:
    """The index in `folder`, if it is whole and describes `shards` as they are now.

    Raises:
        StaleIndexError: if it does not.
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
    """A hash of what the samples are and how they are ordered, not of where the shards lie."""
    return sha256("".join(entry.digest for entry in entries).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        OSError, ValueError: if it is not there, or is no JSON mapping.
    """
    value = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    if not isinstance(value, dict):
        raise ValueError("it is no JSON mapping")
    return value


def parse_entry(value: dict[str, Any]) -> ShardEntry:
    """A shard's entry from JSON."""
    return ShardEntry(**value | {"bad": tuple(value["bad"]), "without_image": tuple(value["without_image"])})


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / _MANIFEST, manifest | {"sha256": _seal(manifest)})


def _seal(manifest: dict[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> tuple[dict[str, Any], tuple[ShardEntry, ...]]:
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["format"] != FORMAT:
            raise StaleIndexError(f"it has format {manifest['format']}, this version writes {FORMAT}")
        if manifest.pop("sha256") != _seal(manifest):
            raise StaleIndexError(f"{_MANIFEST} is damaged: it has another sha256 than when it was written")
        entries = tuple(parse_entry(value) for value in manifest["shards"])
    except FileNotFoundError:
        raise StaleIndexError("there is none") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StaleIndexError(f"{_MANIFEST} is damaged: {error}") from None
    return manifest, entries


def _require_same_shards(entries: Sequence[ShardEntry], shards: Sequence[Shard]) -> None:
    if len(entries) != len(shards):
        raise StaleIndexError(f"it lists {len(entries)} shards, there are {len(shards)}")
    for entry, shard in zip(entries, shards, strict=True):
        for what, old, new in (
            ("name", entry.shard.name, shard.name),
            ("size", entry.size, shard.size),
            ("version", entry.version, shard.version),
        ):
            if old != new:
                raise StaleIndexError(f"{shard} has changed: {what} was {old}, is {new}")


def _mapped_again(folder: Path, entries: tuple[ShardEntry, ...], samples: int, *rest: Any) -> ShardIndex:
    return ShardIndex(folder, entries, _map_records(folder / _RECORDS, samples), *rest)


def _map_records(path: Path, samples: int, crc32: int | None = None) -> Records:
    """Map the records; held against `crc32` where that is given and they are not too many.

    What is wrong in a record of a larger set shows when its image is read, and is held against its own checksum.
    """
    try:
        present = path.stat().st_size
        if present != samples * RECORD.itemsize:
            raise StaleIndexError(f"{path.name} has {present} bytes of {samples * RECORD.itemsize}")
        if crc32 is not None and present <= _VERIFIED_AT_MOST:
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
        while block := file.read(_PIECE):
            yield block
