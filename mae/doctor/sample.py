"""Sample of the training images, decoded as in training."""

from collections import Counter
from dataclasses import dataclass, field

from mae.data.images.decode import count_wide, decode, is_gray, native_channels
from mae.data.images.levels import WideValues
from mae.data.settings import DataSettings
from mae.data.source import Source
from mae.data.statistics import PixelStatistics, PixelSums
from mae.errors import BadImageError, UserError

IMAGES = 256
"""Number of images in the sample."""


@dataclass(frozen=True)
class ImageSample:
    """Statistics, sizes and faults of some images."""

    statistics: PixelStatistics | None
    """None if no image is good."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of each good image [pixels]."""
    planes: Counter[int] = field(default_factory=Counter)
    """Number of good images by the number of colour planes in the file."""
    wide: WideValues = field(default_factory=WideValues)
    """Values of the images of more than 8 bits."""
    bad: list[str] = field(default_factory=list)
    """`shard: key.jpg (reason)` of each bad image."""

    @property
    def images(self) -> int:
        """Number of images, good and bad."""
        return len(self.sizes) + len(self.bad)


def inspect_images(source: Source, data: DataSettings) -> ImageSample:
    """Decode some images of the source.

    Raises:
        UserError: if a shard is damaged, or the source has no image.
    """
    sums, sizes, planes, bad = PixelSums(data.channels), list[tuple[int, int]](), Counter[int](), list[str]()
    wide = WideValues()
    for name, image in source.some_images(IMAGES, data):
        try:
            if isinstance(image, UserError):
                raise image
            count_wide(wide, image)
            pixels = decode(image, data.channels, data.value_range)
        except (BadImageError, UserError) as error:
            bad.append(f"{name} ({error})")
            continue
        sums.add(pixels)
        sizes.append((pixels.shape[1], pixels.shape[2]))
        planes[1 if is_gray(image) else native_channels(image)] += 1
    if not sizes and not bad:
        raise UserError(f"shard {source.shards[0]} holds no image")
    return ImageSample(sums.statistics() if sizes else None, sizes, planes, wide, bad)
