"""torchvision's RandAugment of one image, as a function of a 64-bit word.

The operations, their strengths and the order of the draws are those of torchvision's `v2.RandAugment` with two
operations and 31 magnitudes. torchvision draws from torch's global generator, which threads would share.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

_OPERATIONS = 2
GREATEST_MAGNITUDE = 30


def rand_augment(
    image: UInt8[Tensor, "channels height width"], magnitude: int, word: int
) -> UInt8[Tensor, "channels height width"]:
    """Apply two random operations of a magnitude of 0 to 30 to a gray or an RGB image."""
    generator = torch.Generator().manual_seed(word)
    for _ in range(_OPERATIONS):
        operation, strengths, signed = _SPACE[int(torch.randint(len(_SPACE), (), generator=generator))]
        strength = float(strengths(image.shape[-2], image.shape[-1])[magnitude])
        if signed and torch.rand((), generator=generator) <= 0.5:
            strength = -strength
        image = operation(image, strength)
    return image


def _even(start: float, end: float) -> Tensor:
    return torch.linspace(start, end, GREATEST_MAGNITUDE + 1)


def _affine(image: Tensor, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    # As in torchvision, shear about the corner; a translation needs no centre.
    corner = [0.0, 0.0] if any(shear) else None
    moved: Tensor = vision.affine(image, 0.0, list(translate), 1.0, list(shear), center=corner)
    return moved


def _tilt(strength: float) -> float:
    return math.degrees(math.atan(strength))


_Strengths = Callable[[int, int], Tensor]
_NONE: _Strengths = lambda height, width: torch.zeros(GREATEST_MAGNITUDE + 1)  # noqa: E731
_BITS = (8 - torch.arange(GREATEST_MAGNITUDE + 1) / (GREATEST_MAGNITUDE / 4)).round()
_FARTHEST = 150 / 331  # of the image's side; the paper moved images of 331 pixels by up to 150

# Operation, its strength at each magnitude (by height and width), and whether the sign is random.
_SPACE: tuple[tuple[Callable[[Tensor, float], Tensor], _Strengths, bool], ...] = (
    (lambda image, _: image, _NONE, False),
    (lambda image, s: _affine(image, shear=(_tilt(s), 0.0)), lambda h, w: _even(0.0, 0.3), True),
    (lambda image, s: _affine(image, shear=(0.0, _tilt(s))), lambda h, w: _even(0.0, 0.3), True),
    (lambda image, s: _affine(image, translate=(int(s), 0)), lambda h, w: _even(0.0, _FARTHEST * w), True),
    (lambda image, s: _affine(image, translate=(0, int(s))), lambda h, w: _even(0.0, _FARTHEST * h), True),
    (vision.rotate, lambda h, w: _even(0.0, 30.0), True),
    (lambda image, s: vision.adjust_brightness(image, 1 + s), lambda h, w: _even(0.0, 0.9), True),
    (lambda image, s: vision.adjust_saturation(image, 1 + s), lambda h, w: _even(0.0, 0.9), True),
    (lambda image, s: vision.adjust_contrast(image, 1 + s), lambda h, w: _even(0.0, 0.9), True),
    (lambda image, s: vision.adjust_sharpness(image, 1 + s), lambda h, w: _even(0.0, 0.9), True),
    (lambda image, s: vision.posterize(image, int(s)), lambda h, w: _BITS, False),
    (lambda image, s: vision.solarize(image, 255 * s), lambda h, w: _even(1.0, 0.0), False),
    (lambda image, _: vision.autocontrast(image), _NONE, False),
    (lambda image, _: vision.equalize(image), _NONE, False),
)
