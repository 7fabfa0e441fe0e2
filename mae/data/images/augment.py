"""Random resized crop, flip and RandAugment for training; resize and centre crop for evaluation.

The crop and the flip are functions of uniform numbers that the caller draws, keyed by (seed, epoch, sample id). The
same sample in the same epoch gets the same crop in any worker of any process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from mae.data.images import jpeg
from mae.data.images.decode import decode_pixels, jpeg_header
from mae.data.images.jpeg import Box, cut
from mae.data.images.levels import ValueRange
from mae.data.images.rand_augment import NONE, name_of, rand_augment_of
from mae.data.images.resizing import resized, resized_together
from mae.schema import Formerly
from mae.settings import check

_TRIES = 10
# Images of up to this size are resized together. Larger ones would gain nothing and need more memory.
_SMALL_BYTES = 1 << 16
_MAX_TOGETHER = 512
# Places of the uniform numbers of one view: area and ratio of each try in turn, then three single numbers.
_AREAS, _RATIOS = slice(0, 2 * _TRIES, 2), slice(1, 2 * _TRIES, 2)
_TOP, _LEFT, FLIP = range(2 * _TRIES, 2 * _TRIES + 3)
NUMBERS_PER_SAMPLE = 2 * _TRIES + 3
"""Number of uniform numbers that one training view uses."""
CROP_VERSION = 1
"""Version of the crops and flips that a (seed, epoch, sample id) gets. A test pins them: raise it with any change."""


@dataclass(frozen=True)
class AugmentSettings:
    """Settings of the crop, flip, RandAugment and random erasing of training images."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random crop, as a share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop before it is resized."""
    flip: bool = True
    """Mirror half of the images left to right; turn it off if left and right have a meaning in the images."""
    rand_augment: Annotated[str, Formerly(name_of)] = NONE
    """Random changes of colour and shape. none; a string of timm, such as rand-m9-mstd0.5-inc1, which the published
    fine-tuning uses (m: magnitude, mstd: its noise, n: number of operations, p: probability of each, inc1: all grow
    with m); or torchvision-N: torchvision's two operations of magnitude N, 0 to 30, which are weaker, but change nearly
    all images."""
    erase: float = 0.0
    """Probability that a box of an image is filled with noise (timm's random erasing, mode pixel), in fine-tuning only;
    published: 0.25 after pretraining with normalised targets, else 0."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "0 < least <= greatest <= 1")
        low, high = self.crop_ratio
        check(0 < low <= high < math.inf, "augment.crop_ratio", self.crop_ratio, "0 < least <= greatest")
        object.__setattr__(self, "rand_augment", name_of(self.rand_augment))
        rand_augment_of(self.rand_augment, channels=3)  # refuses other names
        check(0 <= self.erase <= 1, "augment.erase", self.erase, "0 to 1")


def crop_box(height: int, width: int, numbers: Sequence[float], settings: AugmentSettings) -> Box:
    """Return a random box of an image by the rule of torchvision's `RandomResizedCrop.get_params`.

    `numbers` are the `NUMBERS_PER_SAMPLE` uniform numbers in [0, 1) of this view. If none of ten tries fits into the
    image, return the largest centred box within the ratios.
    """
    scale, ratio = settings.crop_scale, settings.crop_ratio
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for share, shape in zip(numbers[_AREAS], numbers[_RATIOS], strict=True):
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        # numpy's exp, as in `crop_boxes`; math.exp may differ in the last bit.
        aspect = float(np.exp(log_ratio[0] + shape * (log_ratio[1] - log_ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[_TOP] * (height - h + 1))
            left = int(numbers[_LEFT] * (width - w + 1))
            return Box(top, left, h, w)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], numbers: NDArray[np.float64], settings: AugmentSettings
) -> NDArray[np.int64]:
    """Return the `crop_box` of many images at once: int64 [images, 4] of top, left, height and width [pixels]."""
    scale, ratio = settings.crop_scale, settings.crop_ratio
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    shares, shapes = numbers[:, _AREAS], numbers[:, _RATIOS]
    areas = (heights * widths)[:, None] * (scale[0] + shares * (scale[1] - scale[0]))
    aspects = np.exp(log_ratio[0] + shapes * (log_ratio[1] - log_ratio[0]))
    w, h = np.rint(np.sqrt(areas * aspects)), np.rint(np.sqrt(areas / aspects))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    chosen = np.arange(len(numbers)), fits.argmax(axis=1)
    random = fits[chosen]
    w = np.where(random, w[chosen], np.minimum(widths, np.maximum(1, np.rint(heights * ratio[1]))))
    h = np.where(random, h[chosen], np.minimum(heights, np.maximum(1, np.rint(widths / ratio[0]))))
    top = np.where(random, numbers[:, _TOP] * (heights - h + 1), (heights - h) // 2)
    left = np.where(random, numbers[:, _LEFT] * (widths - w + 1), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


class TrainViews:
    """Training views of a batch: crop, resize (bicubic, antialiased), flip, RandAugment.

    `add` each image, then `finish`. A view depends only on its own numbers and image, not on the rest of the batch.
    Use one object per thread; several objects may write to different rows of the same `out`.
    """

    def __init__(
        self,
        out: UInt8[Tensor, "rows channels height width"],
        numbers: NDArray[np.float64],
        settings: AugmentSettings,
        words: Sequence[int] = (),
        value_range: ValueRange = None,
        mean: Sequence[float] | None = None,
    ) -> None:
        """Fill `out` by `numbers`, float64 [rows, `NUMBERS_PER_SAMPLE`]; the word of each row keys RandAugment.

        `mean` is the colour with which timm's RandAugment fills what it moves into an image; see `rand_augment_of`.
        """
        self.out, self.numbers, self.settings, self.words = out, numbers, settings, words
        self.value_range = value_range
        self._change = rand_augment_of(settings.rand_augment, out.shape[1], mean)
        self.size = (out.shape[2], out.shape[3])
        self._flips = settings.flip & (numbers[:, FLIP] < 0.5)
        self._pixels = out.permute(0, 2, 3, 1).numpy()
        self._small: list[tuple[int, NDArray[np.uint8]]] = []

    def add(self, image: bytes | NDArray[np.uint8], rows: Sequence[int]) -> None:
        """Make the views of these rows from an encoded image or the pixels of `pixels_to_keep`.

        The image is decoded once; of a JPEG, only the region that the views need. A JPEG whose crops are all at least
        3 (6, 12) times as large as a view is reduced 2 (4, 8) times while it is decoded. The edges of its crops are
        then rounded to whole reduced pixels, so they move by less than 2 (4, 8) pixels. For views of 64 pixels from
        photos of 500x375 this is a fifth faster, with a PSNR of 50 dB against views of the whole image.

        Raises:
            BadImageError: as in `mae.data.images.decode.decode_pixels`; the rows are then unchanged.
        """
        if isinstance(image, np.ndarray):
            self._add_pixels(image, rows)
            return
        channels = self.out.shape[1]
        header = jpeg_header(image, channels)
        crops = None
        if header is not None and _by_region(header, channels, self.size):
            crops = _jpeg_crops(image, header, channels, self.numbers[rows].tolist(), self.settings, self.size)
        if crops is None:
            self._add_pixels(decode_pixels(image, channels, self.value_range, header), rows)
        else:
            self._make(rows, crops)

    def finish(self) -> None:
        """Make the postponed views: small images are much faster together than one by one."""
        if not self._small:
            return
        rows, images = map(list, zip(*self._small, strict=True))
        heights, widths = np.array([pixels.shape[:2] for pixels in images]).T
        boxes = crop_boxes(heights, widths, self.numbers[rows], self.settings).tolist()
        crops = [cut(pixels, Box(*box)) for pixels, box in zip(images, boxes, strict=True)]
        for row, view in zip(rows, resized_together(crops, self._flips[rows], self.size), strict=True):
            self._pixels[row] = view
            self._rand_augment(row)
        self._small.clear()

    def _add_pixels(self, pixels: NDArray[np.uint8], rows: Sequence[int]) -> None:
        if pixels.nbytes > _SMALL_BYTES:
            height, width, _ = pixels.shape
            boxes = [crop_box(height, width, numbers, self.settings) for numbers in self.numbers[rows].tolist()]
            self._make(rows, [cut(pixels, box) for box in boxes])
            return
        self._small += [(row, pixels) for row in rows]
        if len(self._small) >= _MAX_TOGETHER:
            self.finish()

    def _make(self, rows: Sequence[int], crops: Sequence[NDArray[np.uint8]]) -> None:
        for row, crop in zip(rows, crops, strict=True):
            self._pixels[row] = resized(crop, self.size, bool(self._flips[row])).numpy()
            self._rand_augment(row)

    def _rand_augment(self, row: int) -> None:
        if self._change is not None:
            view = self.out[row]
            view.copy_(self._change(view, self.words[row]))


def pixels_to_keep(
    data: bytes, channels: int, size: tuple[int, int], value_range: ValueRange = None
) -> NDArray[np.uint8] | None:
    """Decode an image once for many views of `size` = (height, width): pixels [height width channels].

    Return None for a JPEG of at least three times that size: `TrainViews` may reduce it while it is decoded, so it
    needs the bytes each time.

    Raises:
        BadImageError: as in `mae.data.images.decode.decode_pixels`.
    """
    header = jpeg_header(data, channels)
    return None if header is not None and _is_reducible(header, size) else decode_pixels(data, channels, value_range)


def eval_view(
    image: UInt8[Tensor, "channels height width"], size: tuple[int, int], crop_pct: float
) -> UInt8[Tensor, "channels out_height out_width"]:
    """Resize an image until it just covers `size` / `crop_pct`, then crop `size` = (height, width) from its centre.

    Both sizes are rounded down, as in the evaluation transforms of timm and torchvision.
    """
    height, width = image.shape[1:]
    least = math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
    covering = max(least[0], least[1] * height // width), max(least[1], least[0] * width // height)
    centre: Tensor = vision.center_crop(resize(image, covering), list(size))
    return centre


def resize(
    image: UInt8[Tensor, "channels height width"], size: tuple[int, int]
) -> UInt8[Tensor, "channels out_height out_width"]:
    """Resize an image to `size` = (height, width), bicubic with antialiasing, in uint8."""
    if tuple(image.shape[1:]) == size:
        return image
    return resized(image.permute(1, 2, 0).numpy(), size).permute(2, 0, 1)


def _by_region(header: jpeg.Header, channels: int, size: tuple[int, int]) -> bool:
    """Return whether it saves time to decode only the region that the views need."""
    return header.height * header.width * channels > _SMALL_BYTES or _is_reducible(header, size)


def _jpeg_crops(
    data: bytes,
    header: jpeg.Header,
    channels: int,
    numbers: Sequence[Sequence[float]],
    settings: AugmentSettings,
    size: tuple[int, int],
) -> list[NDArray[np.uint8]] | None:
    """Decode the smallest region that contains all crops, and return the crops; None if Pillow must read the file."""
    boxes = [crop_box(*header.upright, of_view, settings) for of_view in numbers]
    scale = _scale(boxes, size)
    boxes = [Box(*(side // scale for side in box)) for box in boxes]
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    region = Box(top, left, bottom - top, right - left)
    pixels = jpeg.decode_region(data, header, channels, region, scale)
    if pixels is None:
        return None
    return [cut(pixels, box._replace(top=box.top - top, left=box.left - left)) for box in boxes]


def _is_reducible(header: jpeg.Header, size: tuple[int, int]) -> bool:
    """Return whether a crop can be large enough for the image to be reduced while it is decoded."""
    return _scale([Box(0, 0, *header.upright)], size) > 1


def _scale(boxes: Sequence[Box], size: tuple[int, int]) -> int:
    """Return how many times an image may be reduced if every box must stay at least 1.5 times as large as `size`."""
    least = min(min(2 * box.height // (3 * size[0]), 2 * box.width // (3 * size[1])) for box in boxes)
    return next(scale for scale in jpeg.SCALES if scale <= max(least, 1))
