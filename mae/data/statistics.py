"""Mean and standard deviation of the pixels of a data set: exact sums, stored by `mae pack`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from mae.data.decode import decode
from mae.data.index import ImageReader, ShardIndex
from mae.errors import BadImageError, UserError

INFO_FILE = "_info.json"
_MEASURED_AT_MOST = 2000
# A set of constant images has no spread to divide by.
_LEAST_STD = 1 / 255


@dataclass(frozen=True)
class PixelStatistics:
    """Per-channel mean and standard deviation of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"


class PixelSums:
    """Running integer sums, so that the result depends neither on the order nor on who added what."""

    def __init__(self, channels: int) -> None:
        self.pixels = 0
        self.total: NDArray[np.object_] = np.zeros(channels, dtype=object)
        self.squares: NDArray[np.object_] = np.zeros(channels, dtype=object)

    def add(self, image: UInt8[Tensor, "channels height width"]) -> None:
        """Count the pixels of one image."""
        wide = image.flatten(1).to(torch.int64)
        self.pixels += wide.shape[1]
        self.total += np.array(wide.sum(1).tolist(), dtype=object)
        self.squares += np.array((wide * wide).sum(1).tolist(), dtype=object)

    def merge(self, other: "PixelSums") -> None:
        """Add what another has counted."""
        self.pixels += other.pixels
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> PixelStatistics:
        """Mean and population standard deviation over all pixels of all images, in units of 255."""
        mean = [int(t) / self.pixels / 255 for t in self.total]
        variance = [
            (int(s) * self.pixels - int(t) ** 2) / (self.pixels**2 * 255**2)
            for t, s in zip(self.total, self.squares, strict=True)
        ]
        return PixelStatistics(tuple(mean), tuple(max(v**0.5, _LEAST_STD) for v in variance))


def stored_statistics(shards: Sequence[Path], channels: int) -> PixelStatistics | None:
    """What `mae pack` wrote beside these shards, or None if that does not cover all of them."""
    found: set[PixelStatistics] = set()
    for folder in {shard.parent for shard in shards}:
        names = {shard.name for shard in shards if shard.parent == folder}
        for split in read_info(folder).get("splits", {}).values():
            if names <= set(split.get("filenames", ())) and "mean" in split:
                found.add(PixelStatistics(tuple(split["mean"]), tuple(split["std"])))
                break
        else:
            return None
    if len(found) != 1:
        return None
    (only,) = found
    if len(only.mean) == 1:
        return PixelStatistics(only.mean * channels, only.std * channels)
    return only if len(only.mean) == channels else None


def measure(index: ShardIndex, channels: int) -> tuple[PixelStatistics, int]:
    """Statistics of at most 2,000 images spread evenly over the index, and how many those were."""
    reader, sums = ImageReader(index), PixelSums(channels)
    chosen = np.unique(np.linspace(0, len(index) - 1, _MEASURED_AT_MOST).astype(np.int64))
    for sample_id in chosen.tolist():
        try:
            sums.add(decode(reader.read(sample_id), channels))
        except BadImageError as error:
            raise UserError(f"bad image {index.name(sample_id)}: {error}; pack the shard without it") from None
    return sums.statistics(), len(chosen)


def read_info(folder: Path) -> dict[str, Any]:
    """The `_info.json` of a folder of shards; empty if there is none.

    Raises:
        UserError: if the file is no JSON mapping.
    """
    path = folder / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; pack the shards again or delete it") from None
    if not isinstance(info, dict):
        raise UserError(f"{path} must hold a JSON mapping; pack the shards again or delete it")
    return info
