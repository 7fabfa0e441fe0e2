"""Index of a run's shards, if the data settings allow what it holds."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from mae.data.images.decode import CHANNELS, possible_channels
from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.left_out import FOLDERS, describe_not_used
from mae.data.sample_images import spread_images
from mae.data.scan import DOTTED_IMAGES
from mae.data.settings import DataSettings
from mae.errors import BadImageError, UserError, first_of
from mae.output import counted
from mae.processes import default_workers

_INSPECTED_IMAGES = 16


def open_shards(patterns: tuple[str, ...], data: DataSettings, say: Callable[[str], None]) -> ShardIndex:
    """Return the index of the shards that `patterns` name; a missing index is made and reported with `say`.

    Raises:
        UserError: as `open_index`; also if samples have no image, more images are bad than `data` allows, or images
            cannot have its number of channels.
    """
    index = open_index(patterns, data.cache, data.index, default_workers(), say, data.rules)
    for warning in not_used(index):
        say(f"warning: {warning}")
    without_image, bad = index.without_image(), index.bad()
    if without_image and not data.skip_without_image:
        raise UserError(_without_image(index, without_image))
    if len(bad) > data.max_bad_samples:
        raise UserError(
            f"{counted(len(bad), 'bad image')}: {first_of(bad)}; pack the shards without them (mae pack SHARDS --out "
            "DIR --skip_bad True), or allow as many to be replaced with --data.max_bad_samples"
        )
    _require_channels(index, data)
    return index


def not_used(index: ShardIndex) -> list[str]:
    """Return what the shards hold but training does not use, in words."""
    left_out = {kind: found for kind, found in index.left_out().items() if kind != FOLDERS}
    empty = [str(entry.shard) for entry in index.entries if not entry.samples]
    return describe_not_used(left_out, empty, len(index.entries))


def _without_image(index: ShardIndex, keys: Sequence[str]) -> str:
    dotted = index.left_out().get(DOTTED_IMAGES)
    if dotted is None:
        return (
            f"{len(keys)} samples have no image: {first_of(keys)}; "
            "pack the shards without them, or skip them with --data.skip_without_image True"
        )
    return (
        f"{dotted.number} image files belong to no sample, the first: {dotted.first}: their extension begins at the "
        "first dot, so it is not that of an image. If they are images to train on, unpack the shards and pack the "
        "folder with mae pack, which divides names at the last dot, or rename them; if they are side files of images "
        "that are missing, skip them with --data.skip_without_image True"
    )


def _require_channels(index: ShardIndex, data: DataSettings) -> None:
    """Inspect some images, spread evenly, where the number of channels that they can have depends on the image."""
    arrays = sum(entry.extensions.get("npy", 0) for entry in index.entries)
    if not arrays and data.channels in CHANNELS:
        return
    inspected, found = 0, dict[str, tuple[int, ...]]()
    for name, image in spread_images(index, _INSPECTED_IMAGES, data):
        inspected += 1
        if isinstance(image, UserError):
            raise image
        with suppress(BadImageError):  # reported by whoever decodes it
            found[name] = possible_channels(image)
    misfits = [f"{name} has {_one_of(possible)}" for name, possible in found.items() if data.channels not in possible]
    if misfits and (len(misfits) > data.max_bad_samples or len(misfits) == len(found)):
        ((usual, _),) = Counter(found.values()).most_common(1)
        remedy = "pack the shards again without them" if data.channels in usual else f"set it to {_one_of(usual)}"
        raise UserError(
            f"{len(misfits)} of {inspected} inspected images cannot have {data.channels} channels "
            f"(data.channels): {first_of(misfits, most=2)}; {remedy}"
        )


def _one_of(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
