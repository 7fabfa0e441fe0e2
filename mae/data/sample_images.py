"""Images by sample id: read, checked, and kept decoded where the settings ask for it."""

import numpy as np
from numpy.typing import NDArray

from mae.data.images.augment import pixels_to_keep
from mae.data.images.decode import decode_pixels
from mae.data.index import ShardIndex
from mae.data.reader import ImageReader, Location
from mae.data.settings import DataSettings


class SampleImages:
    """Images of indexed shards, by sample id."""

    def __init__(self, index: ShardIndex, data: DataSettings) -> None:
        self.reader = ImageReader(index, data.cache, data.cache_bytes, data.chunk_samples)
        self._data = data
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def get(self, place: Location) -> bytes | NDArray[np.uint8]:
        """Return an image as encoded bytes, or as kept pixels [height width channels].

        Raises:
            UserError: if its data are lost.
            BadImageError: if it has to be decoded to be kept and cannot be.
        """
        if place.sample_id in self._kept:
            return self._kept[place.sample_id]
        data = self.reader.read(place)
        if self._data.keep_decoded:
            pixels = pixels_to_keep(data, self._data.channels, self._data.size)
            if pixels is not None:
                self._kept[place.sample_id] = pixels
                return pixels
        return data

    def pixels(self, place: Location) -> NDArray[np.uint8]:
        """Return the whole decoded image [height width channels]; raises as `get` does."""
        image = self.get(place)
        return decode_pixels(image, self._data.channels) if isinstance(image, bytes) else image

    def named(self, place: Location, error: Exception) -> str:
        """Return `shard: key.jpg (reason)` for messages."""
        return f"{self.reader.name(place.sample_id)} ({error})"
