"""Look at a source of images: count all of them, and draw some to decode; nothing else is read."""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mae.data.classes import class_names
from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.packing.convert import CONVERTED, to_png
from mae.data.packing.items import Item, Source
from mae.data.packing.label_table import LabelTable
from mae.data.packing.sources import SPLITS, find_splits, is_tree
from mae.data.packing.trees import Labels, image_extension
from mae.data.prepare import not_used
from mae.data.sample_images import NamedImage, spread_images
from mae.data.scan import LABEL_EXTENSION, NO_LABEL, parse_label
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics
from mae.data.store.shards import Shard, expand
from mae.data.store.unpacked import default_cache_dir
from mae.data.store.urls import scheme_of
from mae.errors import BadImageError, UserError
from mae.processes import default_workers
from mae.proposal.facts import SplitFacts
from mae.proposal.patterns import by_split, patterns_of
from mae.proposal.sampling import IMAGES

_SEED = 0

Say = Callable[[str], None]


class Look(NamedTuple):
    """What a source holds."""

    splits: tuple[SplitFacts, ...]
    """The split to train on comes first."""
    images: Iterator[NamedImage]
    """Some images of the first split, to be read one by one."""
    class_names: tuple[str, ...]
    notices: tuple[str, ...]
    statistics: PixelStatistics | None = None
    """Mean and standard deviation of the first split, as an index has them."""
    measured: int = 0
    """Number of images on which they were measured."""


def look_into(source: str, labels: Labels, split: str | None, say: Say, table: LabelTable | None = None) -> Look:
    """Count the images of a source that `mae pack` takes, or of shards, and draw some of the split to train on.

    Raises:
        UserError: for a reason of `mae pack` or `mae index`; also for a single image file.
    """
    path = Path(source)
    if path.is_file() and image_extension(path.name):
        raise UserError(f"{source} is one image; give the folder that holds your images, or shards")
    if not path.exists() and not scheme_of(source) and not set(source) & set("*?[{~"):
        raise UserError(f"{source} does not exist; give a folder of images, or shards")
    if not is_tree(source) and table is None:
        return _look_into_shards(by_split(expand([source])), source, say)
    found = find_splits(source, split, default_cache_dir(), labels=labels, table=table)
    if all(not is_tree(one.name) for one in found.values()):
        return _look_into_shards({name: expand([one.name]) for name, one in found.items()}, "", say)
    return _look_into_folders(found, source, say)


def _look_into_folders(found: Mapping[str, Source], place: str, say: Say) -> Look:
    say(f"counting the images in {', '.join(one.name for one in found.values())}")
    splits, drawn, names = list[SplitFacts](), list[Item](), dict[str, None]()
    for name, source in sorted(found.items(), key=lambda split: SPLITS.index(split[0]) if split[0] in SPLITS else 0):
        counts, some = Counter[int](), _Draw(IMAGES)
        for item in source.items:
            some.add(item)
            if (label := _label_of(item)) != NO_LABEL:
                counts[label] += 1
        splits.append(SplitFacts(name, some.seen, dict(sorted(counts.items())), folder=_as_given(source, place)))
        drawn = drawn or some.shuffled()
        names |= dict.fromkeys(source.classes)
    notices = [notice for source in found.values() for notice in source.notices()]
    return Look(tuple(splits), map(_named, drawn), tuple(names), tuple(notices))


def _as_given(source: Source, place: str) -> str:
    """Return the folder of a split by the name that the user gives to the whole."""
    return place if os.path.realpath(place) == source.name else os.path.join(place, os.path.basename(source.name))  # noqa: PTH118, PTH119


class _Draw:
    """Images drawn from a list of unknown length, each with the same probability (reservoir sampling)."""

    def __init__(self, most: int) -> None:
        self.seen, self.items = 0, list[Item]()
        self._most, self._random = most, random.Random(_SEED)  # noqa: S311 - not for secrets

    def shuffled(self) -> list[Item]:
        """Return the images in random order: of large ones, only the first are looked at."""
        return self._random.sample(self.items, len(self.items))

    def add(self, item: Item) -> None:
        """Count an image, and keep it or not."""
        self.seen += 1
        if len(self.items) < self._most:
            self.items.append(item)
        elif (place := self._random.randrange(self.seen)) < self._most:
            self.items[place] = item


def _named(item: Item) -> NamedImage:
    """Read an image; those of formats that `mae pack` converts become PNG."""
    try:
        data = item.image if isinstance(item.image, bytes) else item.image.read()
        return item.name, to_png(data, item.extension) if item.extension in CONVERTED else data
    except UserError as error:
        return item.name, error
    except BadImageError as error:
        return item.name, UserError(str(error))


def _label_of(item: Item) -> int:
    """Return the label of an image; that of an image in a tar is in a side file."""
    for extension, extent in item.side_files:
        if extension == LABEL_EXTENSION:
            label = parse_label(extent.read())
            return NO_LABEL if label is None else label
    return item.label


def _look_into_shards(groups: Mapping[str, Sequence[Shard]], pattern: str, say: Say) -> Look:
    """Look into shards by split; `pattern` is what the user calls them, if they are one split."""
    indexes = {
        name: open_index([shard.url for shard in shards], default_cache_dir(), None, default_workers(), say)
        for name, shards in groups.items()
    }
    splits = []
    for name, index in indexes.items():
        shards = [entry.shard for entry in index.entries]
        patterns = (pattern,) if pattern and len(indexes) == 1 else patterns_of(shards)
        splits.append(SplitFacts(name, len(index), _counts(index), shards=patterns))
    first, *_ = indexes.values()
    names = class_names([entry.shard for entry in first.entries], say) or ()
    notices = [line for index in indexes.values() for line in not_used(index)]
    if without_image := first.without_image():
        notices.append(f"{len(without_image)} samples have no image, the first: {without_image[0]}")
    images = spread_images(first, IMAGES, DataSettings())
    measured = first.pixels_of if first.pixels else 0
    return Look(tuple(splits), images, names, tuple(notices), first.pixels, measured)


def _counts(index: ShardIndex) -> dict[int, int]:
    counts = Counter(index.label.tolist())
    del counts[NO_LABEL]
    return dict(sorted(counts.items()))
