"""From data settings to an index and the statistics that normalise its pixels."""

from collections.abc import Callable
from dataclasses import replace

from mae.data.index import ShardIndex, build_index
from mae.data.loader import DataSettings
from mae.data.shards import default_cache_dir
from mae.data.statistics import PixelStatistics, measure, stored_statistics


def open_shards(patterns: tuple[str, ...], data: DataSettings) -> ShardIndex:
    """The index of the shards that `patterns` name."""
    return build_index(patterns, data.cache_dir or default_cache_dir())


def resolve_statistics(index: ShardIndex, data: DataSettings, say: Callable[[str], None]) -> DataSettings:
    """`data` with its mean and std filled in: as set, else as `mae pack` stored them, else measured."""
    if data.mean is not None:
        return data
    found = stored_statistics(index.shards, data.channels)
    if found is None:
        found, images = measure(index, data.channels)
        say(
            f"no mean and std stored beside the shards: measured on {images:,} of {len(index):,} images "
            f"({found}); `mae pack` measures and stores them"
        )
    return replace(data, mean=found.mean, std=found.std)


def statistics_of(data: DataSettings) -> PixelStatistics:
    """The mean and std of resolved data settings."""
    assert data.mean is not None
    assert data.std is not None
    return PixelStatistics(data.mean, data.std)
