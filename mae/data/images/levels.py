"""Wide pixels: images of more than 8 bits per value, whose values are divided into 256 levels."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae.errors import BadImageError
from mae.output import counted
from mae.settings import check

ValueRange = tuple[float, ...] | None
"""LOW and HIGH for all channels, or a pair for each channel in turn; None: not set."""
SIXTEEN_BITS = (0.0, float(1 << 16))
"""Range of 16-bit images where none is set: the upper eight bits are kept."""
NOT_NUMBERS = "some of its values are not numbers (NaN); replace them"
_LEVELS = 256
_BLOCK_VALUES = 1 << 18
FEW_LEVELS = 64
"""Number of levels, of 256, below which images have lost most of what they show."""


def check_value_range(name: str, value: ValueRange, channels: int) -> None:
    """Raise a `UserError` that names the setting `name` if its value is no range for images of these channels."""
    if value is None:
        return
    check(len(value) in (2, 2 * channels), name, value, f"2 numbers, or 2 for each of {channels} channels")
    is_rising = all(low < high for low, high in _pairs(value))
    check(is_rising and all(map(math.isfinite, value)), name, value, "LOW < HIGH, both finite")


def is_of_16_bits(values: NDArray[Any]) -> bool:
    """Return whether values are unsigned integers of 16 bits, in any byte order."""
    return values.dtype.kind == "u" and values.dtype.itemsize == 2


def to_levels(values: NDArray[Any], value_range: tuple[float, ...]) -> NDArray[np.uint8]:
    """Divide the values from LOW to HIGH, without HIGH, into 256 equal steps: uint8 [height width channels].

    The level is floor((value - LOW) * 256 / (HIGH - LOW)), at least 0 and at most 255, in float64. So `0 65536` keeps
    the upper eight of 16 bits, and `0 4096` those of 12 bits. A single plane is divided by each pair of a range.

    Raises:
        BadImageError: if a value is not a number, or the image has another number of channels than the range.
    """
    if value_range == SIXTEEN_BITS and is_of_16_bits(values):
        return (values >> 8).astype(np.uint8)
    if values.shape[2] == 1 and len(value_range) > 2:
        values = np.repeat(values, len(value_range) // 2, axis=2)
    channels = values.shape[2]
    if len(value_range) not in (2, 2 * channels):
        raise BadImageError(
            f"it has {channels} channels, but data.value_range is for {len(value_range) // 2}; set one pair for all"
        )
    levels = np.empty(values.shape, dtype=np.uint8)
    pairs = _pairs(value_range) * (channels if len(value_range) == 2 else 1)
    for block, of_block in zip(_blocks(values), _blocks(levels), strict=True):
        for channel, (low, high) in enumerate(pairs):
            plane = block[:, :, channel].astype(np.float64)
            if np.isnan(plane).any():
                raise BadImageError(NOT_NUMBERS)
            # Multiplied first, whole numbers up to 2^44 are exact.
            scaled = (plane - low) * _LEVELS / (high - low)
            of_block[:, :, channel] = np.clip(scaled, 0, _LEVELS - 1)
    return levels


@dataclass
class WideValues:
    """Least and greatest value of the wide images of a set."""

    images: int = 0
    least: float = math.inf
    greatest: float = -math.inf
    is_float: bool = False
    fits_sixteen_bits: bool = True
    """Whether all can be decoded without a range, because they are gray images of 16 bits."""

    def add(self, values: NDArray[Any], has_default: bool) -> None:
        """Count the finite values of one image; `has_default` if it can be decoded without a range.

        Raises:
            BadImageError: if a value is not a number.
        """
        least, greatest = math.inf, -math.inf
        for block in _blocks(values):
            if np.isnan(block).any():
                raise BadImageError(NOT_NUMBERS)
            finite = block[np.isfinite(block)]
            if finite.size:
                least, greatest = min(least, float(finite.min())), max(greatest, float(finite.max()))
        is_float = values.dtype.kind == "f"
        self.merge(WideValues(1, least, greatest, is_float, has_default))

    def merge(self, other: "WideValues") -> None:
        """Count the images of `other` too."""
        self.images += other.images
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        self.is_float = self.is_float or other.is_float
        self.fits_sixteen_bits = self.fits_sixteen_bits and other.fits_sixteen_bits

    @property
    def proposal(self) -> str:
        """Range that holds all these values, as an argument of `--data.value_range`.

        Integers: from 0, or the least if it is negative, to a power of two. Others: 0 to 1, or the least and greatest.
        """
        low, high = min(0.0, self.least), self.greatest
        if not self.is_float:
            return f"{low:.0f} {1 << max(8, int(high).bit_length())}"
        if low >= 0 and high < 1:
            return "0 1"
        return f"{self.least:g} {np.nextafter(np.float32(high), np.float32(math.inf)):.9g}"

    @property
    def uses_few_levels(self) -> bool:
        """Whether few of the 256 levels are left where the upper eight of 16 bits are kept."""
        return not self.is_float and self.greatest < FEW_LEVELS * 256

    @property
    def advice(self) -> str:
        """Line for a person who will train on these images."""
        return f"{self}; train with --data.value_range {self.proposal}"

    def __str__(self) -> str:
        return (
            f"{counted(self.images, 'image')} of more than 8 bits with values from {self.least:g} to {self.greatest:g}"
        )


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield views of some rows at a time: copies of all values in wider numbers would be large."""
    rows = max(1, _BLOCK_VALUES // max(1, values.shape[1] * values.shape[2]))
    for start in range(0, len(values), rows):
        yield values[start : start + rows]


def _pairs(value_range: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(value_range[::2], value_range[1::2], strict=True))
