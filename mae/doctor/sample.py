"""Some images of the training data, decoded as training decodes them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mae.data.images.decode import decode, is_gray, native_channels
from mae.data.index import ShardIndex
from mae.data.reader import ImageReader
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics, PixelSums
from mae.data.store.shards import Shard
from mae.data.stream import read_samples
from mae.errors import BadImageError, UserError

IMAGES = 256
"""How many are looked at."""


@dataclass(frozen=True)
class ImageSample:
    """What the images are like."""

    statistics: PixelStatistics | None
    """None if no image is good."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of each good one."""
    planes: Counter[int] = field(default_factory=Counter)
    """Good images by the colour planes that their files hold."""
    bad: list[str] = field(default_factory=list)
    """`shard: key.jpg (reason)`"""

    @property
    def looked_at(self) -> int:
        """Good and bad ones."""
        return len(self.sizes) + len(self.bad)


Image = tuple[str, bytes | UserError]
"""Name, and bytes, or why there are none."""


def look_at_index(index: ShardIndex, data: DataSettings) -> ImageSample:
    """`IMAGES` images spread evenly over all shards."""
    # Of remote shards these images alone are fetched, not the chunks that they lie in.
    reader = ImageReader(index, data.cache, data.cache_bytes, chunk_samples=1)
    ids = np.unique(np.linspace(0, len(index) - 1, IMAGES).astype(np.int64))
    reader.will_need(ids)

    def images() -> Iterator[Image]:
        for place in reader.locate(ids):
            try:
                yield reader.name(place.sample_id), reader.read(place)
            except UserError as error:
                yield reader.name(place.sample_id), error

    return _look_at(images(), data.channels)


def look_at_stream(shard: Shard, data: DataSettings) -> ImageSample:
    """The first `IMAGES` images of a shard: a stream cannot be read elsewhere.

    Raises:
        UserError: if it is damaged or holds none.
    """
    found = _look_at(((s.name, s.image) for s in islice(read_samples(shard, data.cache), IMAGES)), data.channels)
    if not found.looked_at:
        raise UserError(f"shard {shard} holds no image")
    return found


def _look_at(images: Iterator[Image], channels: int) -> ImageSample:
    sums, sizes, planes, bad = PixelSums(channels), list[tuple[int, int]](), Counter[int](), list[str]()
    for name, image in images:
        try:
            if isinstance(image, UserError):
                raise image
            pixels = decode(image, channels)
        except (BadImageError, UserError) as error:
            bad.append(f"{name} ({error})")
            continue
        sums.add(pixels)
        sizes.append((pixels.shape[1], pixels.shape[2]))
        planes[1 if is_gray(image) else native_channels(image)] += 1
    return ImageSample(sums.statistics() if sizes else None, sizes, planes, bad)
