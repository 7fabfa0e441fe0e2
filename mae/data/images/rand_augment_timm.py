"""timm's RandAugment of one image, as a function of a 64-bit word; the published fine-tuning uses rand-m9-mstd0.5-inc1.

The operations are timm's own functions, and the strengths and the order of the draws are those of its
`rand_augment_transform`. timm draws from the global generators of Python and numpy, which threads would share.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data import auto_augment as timm
from torch import Tensor

_PART = re.compile(r"(mstd|inc|m|n|p)([0-9]+(?:\.[0-9]+)?)")
_RANGES = {"m": (0, 100), "n": (1, 100), "p": (0, 1), "mstd": (0, 100), "inc": (0, 1)}
_WHOLE = ("m", "n", "inc")
# Magnitude of the strongest operations; greater ones count as this.
_GREATEST = 10.0


class _Operation(NamedTuple):
    apply: Callable[..., Image.Image]
    strength: Callable[[float], float] | None = None
    """Strength at a level, a tenth of the magnitude; None: the operation has none."""
    signed: bool = False
    """Whether the sign of the level is random."""


@dataclass(frozen=True)
class TimmRandAugment:
    """Options of timm's RandAugment, with timm's defaults."""

    magnitude: int = 10
    """m: strength of the operations; those above 10 count as 10."""
    operations: int = 2
    """n: number of operations that are drawn for each image."""
    probability: float = 0.5
    """p: probability that a drawn operation is applied."""
    deviation: float = 0.0
    """mstd: standard deviation of the normal noise that is added to the magnitude."""
    increasing: bool = False
    """inc: whether every operation changes the image more at a greater magnitude."""

    @classmethod
    def parse(cls, text: str) -> "TimmRandAugment | None":
        """Read a text such as rand-m9-mstd0.5-inc1; return None for any other."""
        first, *parts = text.split("-")
        found: dict[str, float] = {}
        for match in map(_PART.fullmatch, parts):
            if match is None or match[1] in found or (match[1] in _WHOLE and "." in match[2]):
                return None
            found[match[1]] = float(match[2])
        if first != "rand" or any(not low <= found.get(name, low) <= high for name, (low, high) in _RANGES.items()):
            return None
        return cls(
            int(found.get("m", cls.magnitude)),
            int(found.get("n", cls.operations)),
            found.get("p", cls.probability),
            found.get("mstd", cls.deviation),
            bool(found.get("inc", cls.increasing)),
        )

    def __call__(
        self, image: UInt8[Tensor, "channels height width"], word: int, fill: Sequence[int]
    ) -> UInt8[Tensor, "channels height width"]:
        """Apply random operations to a gray or an RGB image; `fill` is the colour of pixels from outside of it.

        The result is timm's after `random.seed(word)` and `np.random.seed([word % 2**32, word // 2**32])`.
        """
        operations, draw = _operations(self.increasing), random.Random(word)  # noqa: S311 (no secret)
        chosen = np.random.RandomState([word % 2**32, word // 2**32]).randint(len(operations), size=self.operations)
        before = image.permute(1, 2, 0).numpy()
        changed = Image.fromarray(before[:, :, 0] if len(image) == 1 else before)
        for number in chosen.tolist():
            if self.probability == 1 or draw.random() <= self.probability:
                changed = self._apply(operations[number], changed, draw, tuple(fill))
        return torch.from_numpy(np.array(changed).reshape(before.shape)).permute(2, 0, 1)

    def _apply(
        self, operation: _Operation, image: Image.Image, draw: random.Random, fill: tuple[int, ...]
    ) -> Image.Image:
        magnitude = float(self.magnitude)
        if self.deviation:
            magnitude = draw.gauss(magnitude, self.deviation)
        level = max(0.0, min(magnitude, _GREATEST)) / 10
        if operation.signed and draw.random() > 0.5:
            level = -level
        strengths = () if operation.strength is None else (operation.strength(level),)
        # Bicubic, as in timm's transforms for images that are resized so.
        return operation.apply(image, *strengths, fillcolor=fill, resample=Image.Resampling.BICUBIC)


@cache
def _operations(increasing: bool) -> tuple[_Operation, ...]:
    """Return timm's operations in its order."""
    enhance, signed = (_increasing_enhancement, True) if increasing else (lambda level: level * 1.8 + 0.1, False)
    return (
        _Operation(timm.auto_contrast),
        _Operation(timm.equalize),
        _Operation(timm.invert),
        _Operation(timm.rotate, lambda level: level * 30.0, signed=True),
        _Operation(_posterize, lambda level: 4 - int(level * 4) if increasing else int(level * 4)),
        _Operation(timm.solarize, lambda level: 256 - _threshold(level) if increasing else _threshold(level)),
        _Operation(timm.solarize_add, lambda level: min(128, int(level * 110))),
        _Operation(timm.color, enhance, signed),
        _Operation(timm.contrast, enhance, signed),
        _Operation(timm.brightness, enhance, signed),
        _Operation(timm.sharpness, enhance, signed),
        _Operation(timm.shear_x, lambda level: level * 0.3, signed=True),
        _Operation(timm.shear_y, lambda level: level * 0.3, signed=True),
        _Operation(timm.translate_x_rel, lambda level: level * 0.45, signed=True),
        _Operation(timm.translate_y_rel, lambda level: level * 0.45, signed=True),
    )


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    # For 0 bits, earlier versions of Pillow return a black image. Pillow 13 refuses them, and with it timm's transform
    # fails at about one image in 650 of the published recipe.
    return timm.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _increasing_enhancement(level: float) -> float:
    return max(0.1, 1.0 + level * 0.9)


def _threshold(level: float) -> int:
    return min(256, int(level * 256))
