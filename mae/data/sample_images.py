"""Images of indexed shards: read by sample id, checked, and kept decoded if the settings say so."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mae.data.images.augment import pixels_to_keep
from mae.data.images.decode import decode_pixels
from mae.data.index import ShardIndex
from mae.data.reader import ImageReader, Location
from mae.data.settings import DataSettings
from mae.data.spread import spread_evenly
from mae.errors import UserError

NamedImage = tuple[str, bytes | UserError]
"""`shard: key.jpg`, and the encoded image or the reason why it cannot be read."""


class SampleImages:
    """Images of indexed shards, by sample id."""

    def __init__(self, index: ShardIndex, data: DataSettings) -> None:
        self.reader = ImageReader(index, data.cache, data.cache_bytes, data.chunk_samples)
        self._data = data
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def get(self, place: Location) -> bytes | NDArray[np.uint8]:
        """Return an image as encoded bytes, or as kept pixels [height width channels].

        Raises:
            UserError: if the image cannot be read, or differs from the index.
            BadImageError: if the image is to be kept, and cannot be decoded.
        """
        if place.sample_id in self._kept:
            return self._kept[place.sample_id]
        data = self.reader.read(place)
        if self._data.keep_decoded:
            pixels = pixels_to_keep(data, self._data.channels, self._data.size, self._data.value_range)
            if pixels is not None:
                self._kept[place.sample_id] = pixels
                return pixels
        return data

    def pixels(self, place: Location) -> NDArray[np.uint8]:
        """Return the whole decoded image [height width channels]; raises as `get` does."""
        image = self.get(place)
        if isinstance(image, bytes):
            return decode_pixels(image, self._data.channels, self._data.value_range)
        return image

    def named(self, place: Location, error: Exception) -> str:
        """Return `shard: key.jpg (reason)`, for messages."""
        return f"{self.reader.name(place.sample_id)} ({error})"


def spread_images(index: ShardIndex, most: int, data: DataSettings) -> Iterator[NamedImage]:
    """Yield at most `most` encoded images, spread evenly over all shards."""
    # From remote shards, single images are fetched instead of whole chunks.
    reader = ImageReader(index, data.cache, data.cache_bytes, chunk_samples=1)
    ids = spread_evenly(len(index), most)
    reader.will_need(ids)
    for location in reader.locate(ids):
        name = reader.name(location.sample_id)
        try:
            yield name, reader.read(location)
        except UserError as error:
            yield name, error
