"""Decoding of the images of an index, to find bad ones and to measure mean and standard deviation."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mae.data.images.decode import decode
from mae.data.images.levels import ValueRange
from mae.data.index import ShardIndex
from mae.data.reader import ImageReader
from mae.data.spread import spread_evenly
from mae.data.statistics import PixelStatistics, SetPixels
from mae.errors import BadImageError, UserError

_MAX_MEASURED = 2000
_BLOCK_IMAGES = 256


def measure(
    index: ShardIndex,
    cache_dir: Path,
    cache_bytes: float,
    channels: int | None = None,
    value_range: ValueRange = None,
) -> tuple[PixelStatistics | None, int]:
    """Measure mean and standard deviation on at most 2,000 evenly spaced images; also return their number.

    Decode into `channels` planes or, if that is None, into the native number. Skip bad images; a later read reports
    them.
    """
    some = spread_evenly(len(index), _MAX_MEASURED)
    # With chunks of one sample, only these images of a remote shard are fetched, not their neighbours.
    pixels, _ = _decode_images(ImageReader(index, cache_dir, cache_bytes, chunk_samples=1), some, channels, value_range)
    return pixels.statistics(), pixels.images


def check_images(
    index: ShardIndex, cache_dir: Path, cache_bytes: float, workers: int, advance: Callable[[int], None]
) -> tuple[SetPixels, list[str]]:
    """Verify and decode every image; return the pixel sums of the good images, and the bad images with reasons.

    `advance` receives the number of images that have just been checked.
    """
    pixels, bad = SetPixels(), list[str]()
    for found, wrong in DataLoader(
        _ImageChecks(ImageReader(index, cache_dir, cache_bytes)),
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


def _decode_images(
    reader: ImageReader,
    ids: NDArray[np.int64],
    channels: int | None = None,
    value_range: ValueRange = None,
    tolerated: type[Exception] = BadImageError,
) -> tuple[SetPixels, list[str]]:
    """Return the pixel sums of the good images, and the bad ones, which raise `BadImageError` or `tolerated`."""
    pixels, bad = SetPixels(), list[str]()
    reader.will_need(ids)
    for place in reader.locate(ids):
        try:
            data = reader.read(place)
            if channels is None:
                pixels.add_native(data)
            else:
                pixels.add(decode(data, channels, value_range), is_gray=False)
        except (BadImageError, tolerated) as error:
            bad.append(f"{reader.name(place.sample_id)} ({error})")
    return pixels, bad
