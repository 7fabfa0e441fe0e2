"""Sizes of images and models that come into question for a set, from what would be best to what is fastest."""

from dataclasses import dataclass
from statistics import median, quantiles
from typing import NamedTuple

from mae.errors import UserError
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.sizes import SIZES, TEMPERATURE, Size
from mae.proposal.facts import Facts, ImageFacts

MANY_IMAGES = 500_000
"""From here on, the paper's recipe for ImageNet is proposed."""
FEW_IMAGES = 5_000
"""Below this, the encoder is a ViT-Ti at most."""
# Images of up to this short side [pixels] have these patches; larger ones have patches of 16.
_PATCHES = ((3, 1), (12, 2), (40, 4), (96, 8))
_LARGE_PATCH, _LARGEST_SIDE = 16, 224
_SMALLER_SIDES = (160, 128)
_LAST_SIDE, _LAST_PATCH = 64, 8
# Up to here, the settings of the demo are proposed, which were measured on 4x4 patches.
_FEW_PATCHES = 16
# Random crops have a width from 3/4 to 4/3 of their height, which covers the usual shapes of photos.
_LONG, _LONGEST, _ALIKE = 1.5, 4.0, 0.05


@dataclass(frozen=True)
class Rung:
    """Encoder and decoder of one size."""

    encoder: str
    decoder: Size
    shape: Size | None = None
    """Shape of the encoder, where it is not that of its name."""

    def settings(self, patch: int, mask_ratio: float, temperature: float) -> MaskedAutoencoderSettings:
        """Return the settings of such a model."""
        width, depth, heads = self.shape or (None, None, None)
        return MaskedAutoencoderSettings(
            size=self.encoder,
            width=width,
            depth=depth,
            heads=heads,
            patch_size=(patch,),
            position_temperature=temperature,
            mask_ratio=mask_ratio,
            decoder_width=self.decoder.width,
            decoder_depth=self.decoder.depth,
            decoder_heads=self.decoder.heads,
        )

    @property
    def text(self) -> str:
        """Name and shape of the encoder."""
        width, depth, heads = self.shape or SIZES[self.encoder]
        return f"{self.encoder} {width}/{depth}/{heads}" if self.shape is None else f"{width}/{depth}/{heads}"


RUNGS = (
    Rung("base", Size(512, 8, 16)),
    Rung("small", Size(256, 8, 8)),
    Rung("tiny", Size(128, 2, 4)),
    Rung("tiny", Size(96, 2, 4), Size(192, 6, 3)),
    Rung("tiny", Size(64, 1, 2), Size(128, 4, 4)),
    Rung("tiny", Size(32, 1, 2), Size(64, 4, 4)),
)
"""Models from the paper's ViT-B down to that of the demo."""
_BASE, _SMALL, _TINY, _HALF, _MINI, _MICRO = range(len(RUNGS))


class Shape(NamedTuple):
    """Size of the images and of the model."""

    height: int
    width: int
    patch: int
    rung: Rung

    @property
    def short(self) -> int:
        """Short side of the images [pixels]."""
        return min(self.height, self.width)

    @property
    def settings(self) -> MaskedAutoencoderSettings:
        """Settings of the model; with few patches, half are hidden instead of three quarters, and positions differ."""
        has_few = self.height * self.width // self.patch**2 <= _FEW_PATCHES
        return self.rung.settings(self.patch, *((0.5, 10.0) if has_few else (0.75, TEMPERATURE)))


def short_side(images: ImageFacts) -> int:
    """Return the median of the short sides of the images [pixels]."""
    return int(median(min(size) for size in images.sizes))


def common_aspect(images: ImageFacts) -> float:
    """Return the width / height that nearly all images have, if they are long, but not strips; 1 otherwise."""
    aspects = sorted(width / height for height, width in images.sizes)
    if len(aspects) > 1:
        low, *_, high = quantiles(aspects, n=10)
    else:
        low = high = aspects[0]
    middle = median(aspects)
    is_long = _LONG <= max(middle, 1 / middle) <= _LONGEST
    return middle if is_long and high - low <= 2 * _ALIKE * middle else 1.0


def shapes(facts: Facts) -> list[Shape]:
    """Return what comes into question, the best first: first the model becomes smaller, then the images, then both.

    Raises:
        UserError: if the images have a single pixel.
    """
    short, aspect = short_side(facts.images), common_aspect(facts.images)
    patch = next((patch for most, patch in _PATCHES if short <= most), _LARGE_PATCH)
    side = min(_LARGEST_SIDE, short) // patch * patch
    if side < 2:
        raise UserError(f"most images in {facts.source} have a side of {short} pixel; nothing can be hidden in them")
    first = _first_rung(facts.train.images, side)
    steps = [(side, patch, rung) for rung in range(first, _TINY + 1)]
    if patch == _LARGE_PATCH:
        smaller = [other for other in _SMALLER_SIDES if other < side]
        steps += [(other, patch, _TINY) for other in smaller]
        last = (smaller or [side])[-1]
        steps += [(last, patch, _HALF), (last, patch, _MINI)]
        steps += [(_LAST_SIDE, _LAST_PATCH, rung) for rung in (_MINI, _MICRO)]
    else:
        steps += [(side, patch, rung) for rung in (_HALF, _MINI, _MICRO) if rung >= first]
    return [_shape(side, patch, RUNGS[rung], aspect) for side, patch, rung in steps]


def _first_rung(images: int, side: int) -> int:
    if side <= 12:
        return _MICRO
    if images >= MANY_IMAGES and side >= _SMALLER_SIDES[-1]:
        return _BASE
    return _SMALL if images >= FEW_IMAGES and side > 40 else _TINY


def _shape(side: int, patch: int, rung: Rung, aspect: float) -> Shape:
    long = max(side, round(side * max(aspect, 1 / aspect) / patch) * patch)
    return Shape(side, long, patch, rung) if aspect >= 1 else Shape(long, side, patch, rung)
