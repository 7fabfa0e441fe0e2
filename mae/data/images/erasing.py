"""Random erasing (Zhong et al. 2017, arXiv:1708.04896) of normalised images, as a function of a 64-bit word each.

The boxes, the noise and the order of the draws are those of timm's `RandomErasing` with mode `pixel` and one box, as in
the published fine-tuning. timm draws from the global generators of Python and torch.
"""

import math
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from mae.data.images.jpeg import Box

_TRIES = 10
_AREAS = 0.02, 1 / 3
_LOG_RATIOS = math.log(0.3), math.log(1 / 0.3)


def erase(
    images: Float32[Tensor, "batch channels height width"], words: Sequence[int], probability: float
) -> Float32[Tensor, "batch channels height width"]:
    """Fill a box of some images with normal noise, in place, and return them.

    Each image has a word, from which its box and noise are drawn; without words the images stay as they are. The noise
    is drawn on the device of the images: CPU and GPU draw different numbers.
    """
    height, width = images.shape[2:]
    for image, word in zip(images, words, strict=True) if words else ():
        box = erased_box(height, width, word, probability)
        if box is not None:
            generator = torch.Generator(images.device).manual_seed(word)
            shape = (images.shape[1], box.height, box.width)
            noise = torch.randn(shape, generator=generator, device=images.device)
            image[:, box.top : box.top + box.height, box.left : box.left + box.width] = noise
    return images


def erased_box(height: int, width: int, word: int, probability: float) -> Box | None:
    """Return the box to erase from an image of this height and width [pixels]; None for no box.

    Its area is 2 % to a third of the image's, its height / width 0.3 to 1 / 0.3. It is drawn up to ten times until it
    is smaller than the image.
    """
    draw = random.Random(word)  # noqa: S311 (no secret)
    if draw.random() > probability:
        return None
    for _ in range(_TRIES):
        area = draw.uniform(*_AREAS) * (height * width)
        ratio = math.exp(draw.uniform(*_LOG_RATIOS))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_width < width and box_height < height:
            top = draw.randint(0, height - box_height)
            left = draw.randint(0, width - box_width)
            return Box(top, left, box_height, box_width)
    return None
