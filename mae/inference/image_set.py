"""Sets of images that a model is applied to."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mae.data.index import ShardIndex
from mae.data.reader import ImageReader
from mae.data.settings import DataSettings


class ImageSet(ABC):
    """Images by number, in the order in which their results are written."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes with the images, their order or their names."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Return the path or the key of an image."""

    @abstractmethod
    def label(self, number: int) -> int | None:
        """Return the label of an image; None if it has none."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            UserError: if it cannot be read, or has changed.
        """

    def class_name(self, label: int) -> str | None:
        """Return the name of a label; None if it is not known."""
        return None

    def will_need(self, numbers: range) -> None:  # noqa: B027 - most sets need no preparation
        """Prefetch some images."""


class ShardImages(ImageSet):
    """Images of indexed shards."""

    def __init__(self, index: ShardIndex, data: DataSettings, names: Sequence[str] | None = None) -> None:
        self.index, self._names = index, names or ()
        self._reader = ImageReader(index, data.cache, data.cache_bytes, data.chunk_samples)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the index."""
        return self.index.fingerprint

    def __len__(self) -> int:
        return len(self.index)

    def name(self, number: int) -> str:
        """Return the name of the shard and of the image in it."""
        return self._reader.name(number)

    def label(self, number: int) -> int | None:
        """Return the label of an image; None if it has none."""
        label = int(self.index.label[number])
        return label if label >= 0 else None

    def class_name(self, label: int) -> str | None:
        """Return the name of a label in the class list beside the shards; None without one."""
        return self._names[label] if label < len(self._names) else None

    def read(self, number: int) -> bytes:
        """Return the bytes of an image, unchanged since it was indexed."""
        (place,) = self._reader.locate(_ids(range(number, number + 1)))
        return self._reader.read(place)

    def will_need(self, numbers: range) -> None:
        """Prefetch some images."""
        self._reader.will_need(_ids(numbers))


def _ids(numbers: range) -> NDArray[np.int64]:
    return np.arange(numbers.start, numbers.stop)
