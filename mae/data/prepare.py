"""From data settings to an index and the statistics that normalise its pixels."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from mae.data.images.decode import CHANNELS, possible_channels
from mae.data.index import ShardIndex
from mae.data.indexing import measure, open_index
from mae.data.reader import ImageReader
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics, for_channels, stored_statistics
from mae.data.store.shards import Shard
from mae.errors import BadImageError, UserError, first_of
from mae.processes import default_workers

_LOOKED_AT_MOST = 16


def open_shards(patterns: tuple[str, ...], data: DataSettings, say: Callable[[str], None]) -> ShardIndex:
    """The index of the shards that `patterns` name; made, and said so, where there is none.

    Raises:
        UserError: as `open_index`, and for samples without an image, more bad images than `data` allows, or images
            that do not have its channels.
    """
    index = open_index(patterns, data.cache, data.index, default_workers(), say)
    without_image, bad = index.without_image(), index.bad()
    if without_image and not data.skip_without_image:
        raise UserError(
            f"{len(without_image)} samples have no image: {first_of(without_image)}; "
            "pack the shards without them, or leave them out with --data.skip_without_image True"
        )
    if len(bad) > data.max_bad_samples:
        raise UserError(
            f"{len(bad)} images are bad: {first_of(bad)}; pack the shards without them (mae pack SHARDS --out DIR "
            "--skip_bad True), or have so many replaced with --data.max_bad_samples"
        )
    _require_channels(index, data)
    return index


def _require_channels(index: ShardIndex, data: DataSettings) -> None:
    """Look at some images, spread evenly, if it depends on them whether they can have so many channels."""
    arrays = sum(entry.extensions.get("npy", 0) for entry in index.entries)
    if not arrays and data.channels in CHANNELS:
        return
    ids = np.unique(np.linspace(0, len(index) - 1, _LOOKED_AT_MOST).astype(np.int64))
    # Of remote shards these images alone are fetched, not the chunks that they lie in.
    reader = ImageReader(index, data.cache, data.cache_bytes, chunk_samples=1)
    reader.will_need(ids)
    found: dict[str, tuple[int, ...]] = {}
    for place in reader.locate(ids):
        with suppress(BadImageError):  # who reads it next tells
            found[reader.name(place.sample_id)] = possible_channels(reader.read(place))
    misfits = [f"{name} has {_one_of(possible)}" for name, possible in found.items() if data.channels not in possible]
    if misfits and (len(misfits) > data.max_bad_samples or len(misfits) == len(found)):
        ((usual, _),) = Counter(found.values()).most_common(1)
        remedy = "pack the shards again without them" if data.channels in usual else f"set it to {_one_of(usual)}"
        raise UserError(
            f"{len(misfits)} of {len(ids)} images that were looked at cannot have {data.channels} channels "
            f"(data.channels): {first_of(misfits, most=2)}; {remedy}"
        )


def _one_of(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def resolve_statistics(index: ShardIndex, data: DataSettings, say: Callable[[str], None]) -> DataSettings:
    """`data` with its mean and std filled in: as set, else as `mae pack` stored them, else as the index has them."""
    if data.mean is not None:
        return data
    found, images = stored_statistics([entry.shard for entry in index.entries], data.channels), len(index)
    if found is None and index.pixels is not None:
        found, images = for_channels(index.pixels, data.channels), index.pixels_of
    if found is None:
        found, images = measure(index, data.cache, data.channels)
    if found is None:
        raise UserError(
            f"no image could be decoded into {data.channels} channels (data.channels) to measure mean and std; "
            "set the number of channels that the images have"
        )
    if images < len(index):
        say(
            f"mean and std were measured on {images:,} of {len(index):,} images ({found}); "
            "`mae pack` and `mae index --check` measure all"
        )
    return replace(data, mean=found.mean, std=found.std)


def stored_for_stream(shards: Sequence[Shard], data: DataSettings) -> DataSettings:
    """`data` with its mean and std filled in: as set, else as `mae pack` stored them. A stream has no index to ask.

    Raises:
        UserError: if there are none.
    """
    found = None if data.mean is not None else stored_statistics(shards, data.channels)
    if found is None and data.mean is None:
        raise UserError("data.mean and data.std are not set, and a stream cannot measure them; set both")
    return data if found is None else replace(data, mean=found.mean, std=found.std)


def statistics_of(data: DataSettings) -> PixelStatistics:
    """The mean and std of resolved data settings."""
    assert data.mean is not None
    assert data.std is not None
    return PixelStatistics(data.mean, data.std)
