"""Mean and standard deviation of the pixels of a data set, from exact sums; `mae pack` stores them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from mae.data.images.decode import count_wide, decode, is_gray, native_channels
from mae.data.images.levels import WideValues
from mae.data.store.regular import read_json, require
from mae.data.store.shards import Shard
from mae.errors import UserError

INFO_FILE = "_info.json"
# Values that are summed at once, each in 24 bytes.
_BAND_VALUES = 1 << 18
# Images of one constant value would have a standard deviation of 0, which cannot be divided by.
_MIN_STD = 1 / 255


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation of each channel, for pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"


class PixelSums:
    """Running integer sums of pixels. They are exact, so neither the order nor the grouping of images matters."""

    def __init__(self, channels: int) -> None:
        self.pixels = 0
        self.total: NDArray[np.object_] = np.zeros(channels, dtype=object)
        self.squares: NDArray[np.object_] = np.zeros(channels, dtype=object)

    def add(self, image: UInt8[Tensor, "channels height width"]) -> None:
        """Count the pixels of one image, band by band: a copy of the whole image as int64 would take gigabytes."""
        channels, height, width = image.shape
        self.pixels += height * width
        across = max(1, _BAND_VALUES // channels)
        for rows in torch.split(image, max(1, across // max(1, width)), dim=1):
            for band in torch.split(rows, across, dim=2):
                wide = band.flatten(1).to(torch.int64)
                self.total += np.array(wide.sum(1).tolist(), dtype=object)
                self.squares += np.array((wide * wide).sum(1).tolist(), dtype=object)

    def merge(self, other: "PixelSums") -> None:
        """Add the sums of `other`."""
        self.pixels += other.pixels
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> PixelStatistics:
        """Return mean and population standard deviation of all pixels, scaled to 0..1."""
        mean = [int(t) / self.pixels / 255 for t in self.total]
        variance = [
            (int(s) * self.pixels - int(t) ** 2) / (self.pixels**2 * 255**2)
            for t, s in zip(self.total, self.squares, strict=True)
        ]
        return PixelStatistics(tuple(mean), tuple(max(v**0.5, _MIN_STD) for v in variance))


class SetPixels:
    """Pixel sums of the images of a set, kept separately for each number of channels."""

    def __init__(self) -> None:
        self.images = 0
        self.wide = WideValues()
        self._sums: dict[int, PixelSums] = {}
        self._all_gray = True

    def add_native(self, data: bytes) -> None:
        """Count one image file with the number of channels that it has; of more than 8 bits, count its values.

        Raises:
            BadImageError: if it cannot be decoded.
        """
        if count_wide(self.wide, data):
            self.images += 1
        else:
            self.add(decode(data, native_channels(data)), is_gray(data))

    def add(self, image: UInt8[Tensor, "channels height width"], is_gray: bool) -> None:
        """Count one image; `is_gray` if its file stores a single plane."""
        self.images += 1
        self._sums.setdefault(len(image), PixelSums(len(image))).add(image)
        self._all_gray = self._all_gray and is_gray

    def merge(self, other: "SetPixels") -> None:
        """Add the sums of `other`."""
        self.images += other.images
        self.wide.merge(other.wide)
        for channels, sums in other._sums.items():
            self._sums.setdefault(channels, PixelSums(channels)).merge(sums)
        self._all_gray = self._all_gray and other._all_gray

    def to_json(self) -> dict[str, Any]:
        """Return the exact sums as a JSON mapping; JSON has integers of any size."""
        sums = {
            channels: {"pixels": found.pixels, "total": found.total.tolist(), "squares": found.squares.tolist()}
            for channels, found in self._sums.items()
        }
        wide = asdict(self.wide) if self.wide.images else None
        return {"images": self.images, "all_gray": self._all_gray, "sums": sums, "wide": wide}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "SetPixels":
        """Restore the sums from the mapping of `to_json`."""
        pixels = SetPixels()
        pixels.images, pixels._all_gray = value["images"], value["all_gray"]
        if value.get("wide") is not None:
            pixels.wide = WideValues(**value["wide"])
        for channels, found in value["sums"].items():
            sums = pixels._sums[int(channels)] = PixelSums(int(channels))
            sums.pixels = found["pixels"]
            sums.total, sums.squares = np.array(found["total"], object), np.array(found["squares"], object)
        return pixels

    def statistics(self) -> PixelStatistics | None:
        """Return mean and standard deviation: one value each if all images are gray.

        Return None if their channels differ, or some have more than 8 bits: those depend on the range of their values.
        """
        if len(self._sums) != 1 or self.wide.images:
            return None
        ((channels, sums),) = self._sums.items()
        found = sums.statistics()
        return PixelStatistics(found.mean[:1], found.std[:1]) if self._all_gray and channels == 3 else found


def stored_statistics(
    shards: Sequence[Shard], channels: int, lengths: Mapping[str, int] | None = None
) -> PixelStatistics | None:
    """Return the statistics that `mae pack` stored beside these shards; None if they do not cover all shards.

    Nor are they used if the images of a shard, by its name in `lengths`, have another number than they had then: the
    shard was replaced.
    """
    if any(shard.is_remote for shard in shards):
        return None
    found: set[PixelStatistics] = set()
    for folder in {Path(shard.url).parent for shard in shards}:
        names = {shard.name for shard in shards if Path(shard.url).parent == folder}
        for split in read_info(folder).get("splits", {}).values():
            if "mean" in split and names <= set(map(str, split.get("filenames", ()))) and _has_lengths(split, lengths):
                found.add(parse_statistics(split["mean"], split["std"]))
                break
        else:
            return None
    return for_channels(found.pop(), channels) if len(found) == 1 else None


def _has_lengths(split: Mapping[str, Any], lengths: Mapping[str, int] | None) -> bool:
    packed = dict(zip(map(str, split.get("filenames", ())), split.get("shard_lengths", ()), strict=False))
    return lengths is None or all(packed.get(name, found) == found for name, found in lengths.items())


def for_channels(statistics: PixelStatistics, channels: int) -> PixelStatistics | None:
    """Return the statistics of images decoded into `channels` planes, or None; those of gray images fit colour too."""
    if len(statistics.mean) == 1 and channels in (1, 3):
        return PixelStatistics(statistics.mean * channels, statistics.std * channels)
    return statistics if len(statistics.mean) == channels else None


def parse_statistics(mean: Any, std: Any) -> PixelStatistics:
    """Build mean and standard deviation from values of a JSON file.

    Raises:
        ValueError, TypeError: if they are no lists of numbers, as many of each, from 0 to 1, or a deviation is 0.
    """
    found = PixelStatistics(tuple(mean), tuple(std))
    for number in (*found.mean, *found.std):
        require(isinstance(number, int | float) and 0 <= number <= 1, "a mean or std", number)
    require(0 < len(found.mean) == len(found.std) and min(found.std) > 0, "mean and std", found)
    return found


def read_info(folder: Path) -> dict[str, Any]:
    """Read the `_info.json` of a folder of shards; return an empty mapping if there is none.

    Raises:
        UserError: if the file cannot be read, is not a JSON mapping, or holds splits of another form than `mae pack`
            and timm give them.
    """
    path = folder / INFO_FILE
    try:
        info = read_json(path)
        splits = info.get("splits", {})
        if not isinstance(splits, dict) or not all(isinstance(split, dict) for split in splits.values()):
            raise ValueError("it must hold a mapping of splits")
        for split in splits.values():
            for name in ("filenames", "shard_lengths"):
                require(isinstance(split.get(name, []), list), name, split.get(name))
            if "mean" in split:
                parse_statistics(split["mean"], split["std"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; pack the shards again or delete it") from None
    return info
