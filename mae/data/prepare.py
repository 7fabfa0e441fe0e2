"""From data settings to an index and the statistics that normalise its pixels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from mae.data.index import ShardIndex
from mae.data.indexing import measure, open_index
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics, for_channels, stored_statistics
from mae.data.store.shards import Shard
from mae.errors import UserError, first_of
from mae.processes import default_workers


def open_shards(patterns: tuple[str, ...], data: DataSettings, say: Callable[[str], None]) -> ShardIndex:
    """The index of the shards that `patterns` name; made, and said so, where there is none.

    Raises:
        UserError: as `open_index`, and for samples without an image or more bad images than `data` allows.
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
    return index


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
