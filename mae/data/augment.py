"""Random resized crop, flip and RandAugment for training; resize and centre crop for evaluation.

The crop and the flip are functions of uniform numbers that the caller draws, keyed by (seed, epoch,
sample id): the same sample in the same epoch is cut the same way in any worker of any process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from mae.settings import check

_TRIES = 10
NUMBERS_PER_SAMPLE = 2 * _TRIES + 3
"""Uniform numbers that one training crop uses up: area and ratio of each try, top, left, flip."""


@dataclass(frozen=True)
class AugmentSettings:
    """How training images are cut and changed."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the image's area that a random crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height of a random crop, before it is resized."""
    flip: bool = True
    """Mirror half of the images left to right; turn it off where left and right mean something."""
    rand_augment: int = 0
    """Magnitude of torchvision's RandAugment with two operations, 0 to 30; 0 turns it off (the paper's
    fine-tuning uses 9, its pretraining 0)."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "0 < least <= greatest <= 1")
        low, high = self.crop_ratio
        check(0 < low <= high < math.inf, "augment.crop_ratio", self.crop_ratio, "0 < least <= greatest")
        check(0 <= self.rand_augment <= 30, "augment.rand_augment", self.rand_augment, "0 to 30")


class Box(NamedTuple):
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(height: int, width: int, numbers: Sequence[float], settings: AugmentSettings) -> Box:
    """A random box of an image by the rule of torchvision's `RandomResizedCrop.get_params`.

    `numbers` are the `NUMBERS_PER_SAMPLE` uniform numbers in [0, 1) of this sample. After ten tries that do
    not fit, the largest centred box within the ratios.
    """
    scale, ratio = settings.crop_scale, settings.crop_ratio
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for trial in range(_TRIES):
        area = height * width * (scale[0] + numbers[2 * trial] * (scale[1] - scale[0]))
        aspect = math.exp(log_ratio[0] + numbers[2 * trial + 1] * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[2 * _TRIES] * (height - h + 1))
            left = int(numbers[2 * _TRIES + 1] * (width - w + 1))
            return Box(top, left, h, w)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def train_view(
    image: UInt8[Tensor, "channels height width"],
    size: tuple[int, int],
    numbers: Sequence[float],
    settings: AugmentSettings,
) -> UInt8[Tensor, "channels out_height out_width"]:
    """Crop, resize (bicubic, antialiased) to `size` = (height, width) and perhaps mirror one image.

    RandAugment, where it is on, draws from torch's generator, which the caller must have keyed.
    """
    box = crop_box(image.shape[1], image.shape[2], numbers, settings)
    view = resize(image[:, box.top : box.top + box.height, box.left : box.left + box.width], size)
    if settings.flip and numbers[-1] < 0.5:
        view = view.flip(-1)
    if settings.rand_augment:
        view = v2.RandAugment(num_ops=2, magnitude=settings.rand_augment)(view)
    return view


def eval_view(
    image: UInt8[Tensor, "channels height width"], size: tuple[int, int], crop_pct: float
) -> UInt8[Tensor, "channels out_height out_width"]:
    """Resize so that `size` / `crop_pct` is just covered, then cut `size` = (height, width) from the centre.

    Both roundings are down, as in timm's and torchvision's evaluation transforms.
    """
    height, width = image.shape[1:]
    least = math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
    scale = max(least[0] / height, least[1] / width)
    covering = max(least[0], int(height * scale)), max(least[1], int(width * scale))
    centre: Tensor = vision.center_crop(resize(image, covering), list(size))
    return centre


def resize(
    image: UInt8[Tensor, "channels height width"], size: tuple[int, int]
) -> UInt8[Tensor, "channels out_height out_width"]:
    """Bicubic with antialiasing, in uint8."""
    if tuple(image.shape[1:]) == size:
        return image
    resized: Tensor = vision.resize(image, list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return resized


def seed_augmentation(word: int) -> None:
    """Key torch's CPU generator, from which RandAugment draws; those of other devices stay as they are."""
    torch.default_generator.manual_seed(word)
