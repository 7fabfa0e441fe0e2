"""Manifest of an index: what each shard held when it was read.

A manifest is JSON that anyone may have written, so every value is checked before it is used.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae import __version__
from mae.data.left_out import Counted, LeftOut
from mae.data.scan import ShardScan
from mae.data.statistics import PixelStatistics, parse_statistics
from mae.data.store.regular import is_count, read_json, require
from mae.data.store.shards import Shard
from mae.files import write_atomically

FORMAT = 2
"""Version of the files; increase it when their meaning changes. An index of another version is built again."""
MANIFEST = "manifest.json"


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
    left_out: LeftOut
    bad: tuple[str, ...]
    without_image: tuple[str, ...]
    last_dot: str
    """See `ShardScan.last_dot`."""

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
            left_out=found.left_out,
            bad=found.bad,
            without_image=found.without_image,
            last_dot=found.last_dot,
        )

    @property
    def shard(self) -> Shard:
        """Shard with the size and version that it had when it was read."""
        return Shard(self.url, self.size, self.version)


class Manifest(NamedTuple):
    """Contents of the manifest of an index."""

    entries: tuple[ShardEntry, ...]
    """Shards in order."""
    image_extension: str | None
    """Setting with which the shards were read."""
    records_crc32: int
    pixels: PixelStatistics | None = None
    pixels_of: int = 0

    @property
    def samples(self) -> int:
        """Number of samples of all shards."""
        return sum(entry.samples for entry in self.entries)


def fingerprint(entries: Sequence[ShardEntry]) -> str:
    """Return a hash of the samples and their order; it does not depend on the location of the shards."""
    return sha256("".join(entry.digest for entry in entries).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=1).encode())


def parse_entry(value: dict[str, Any]) -> ShardEntry:
    """Build a shard's entry from its JSON mapping.

    Raises:
        ValueError, TypeError, KeyError: if a value is missing, or of another type than an entry has.
    """
    left_out = {kind: Counted(*counted) for kind, counted in dict(value["left_out"]).items()}
    names = {name: tuple(value[name]) for name in ("bad", "without_image")}
    entry = ShardEntry(**value | {"left_out": left_out, **names})
    texts = (entry.url, entry.version, entry.digest, entry.last_dot, *entry.bad, *entry.without_image)
    counts = (
        entry.size,
        entry.samples,
        *dict(value["extensions"]).values(),
        *(found.number for found in left_out.values()),
    )
    require(isinstance(entry.extensions, dict), "extensions", entry.extensions)
    for text in (*texts, *(found.first for found in left_out.values())):
        require(isinstance(text, str), "a text", text)
    for count in counts:
        require(is_count(count), "a count", count)
    return entry


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an index, with a checksum of itself."""
    values = {
        "format": FORMAT,
        "samples": manifest.samples,
        "fingerprint": fingerprint(manifest.entries),
        "records_crc32": manifest.records_crc32,
        "image_extension": manifest.image_extension,
        "mean": manifest.pixels and manifest.pixels.mean,
        "std": manifest.pixels and manifest.pixels.std,
        "pixels_of": manifest.pixels_of,
        "made_by": {"mae": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "shards": [asdict(entry) for entry in manifest.entries],
    }
    write_json(folder / MANIFEST, values | {"sha256": _seal(values)})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index.

    Raises:
        StaleIndexError: if it is missing, damaged or of another format.
    """
    try:
        values = read_json(folder / MANIFEST)
        if values["format"] != FORMAT:
            raise StaleIndexError(f"it has format {str(values['format'])[:20]}, but this version needs format {FORMAT}")
        if values.pop("sha256") != _seal(values):
            raise StaleIndexError(f"{MANIFEST} is damaged: its sha256 has changed since it was written")
        return _parse(values)
    except FileNotFoundError:
        raise StaleIndexError("there is no index") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StaleIndexError(f"{MANIFEST} is damaged: {error}") from None


def _parse(values: dict[str, Any]) -> Manifest:
    mean, std, extension = values["mean"], values["std"], values["image_extension"]
    manifest = Manifest(
        entries=tuple(parse_entry(value) for value in values["shards"]),
        image_extension=extension,
        records_crc32=values["records_crc32"],
        pixels=None if mean is None else parse_statistics(mean, std),
        pixels_of=values["pixels_of"],
    )
    require(extension is None or isinstance(extension, str), "image_extension", extension)
    for name in ("samples", "records_crc32", "pixels_of"):
        require(is_count(values[name]), name, values[name])
    require(0 < values["samples"] == manifest.samples, "samples", values["samples"])
    require(values["fingerprint"] == fingerprint(manifest.entries), "fingerprint", values["fingerprint"])
    return manifest


def _seal(values: dict[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
