"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) by its name in the settings: torchvision's or timm's.

Both depend only on the image and a 64-bit word. timm's is the one of the published fine-tuning: an image of 224 pixels
changes by more on average, but a quarter of the images stay as they are.
"""

import re
from collections.abc import Callable, Sequence

from jaxtyping import UInt8
from torch import Tensor

from mae.data.images.rand_augment_timm import TimmRandAugment
from mae.data.images.rand_augment_torchvision import GREATEST_MAGNITUDE, rand_augment
from mae.errors import UserError

Change = Callable[[UInt8[Tensor, "channels height width"], int], UInt8[Tensor, "channels height width"]]
"""Function of an image and a 64-bit word."""

NONE = "none"
"""Name of no RandAugment."""
FORMS = (
    f"{NONE}; torchvision-N with N from 0 to {GREATEST_MAGNITUDE}; or timm's, such as rand-m9-mstd0.5-inc1, with some "
    "of m (0 to 100), mstd (0 to 100), n (1 to 100), p (0 to 1) and inc (0 or 1), each once"
)
"""Names that are allowed, in words."""
# Colour for pixels from outside the image if the mean of the data is not known; timm has the same.
_GRAY = 128 / 255
_NUMBER = re.compile(r"[0-9]{1,3}")
_TORCHVISION = re.compile(r"torchvision-([0-9]{1,2})")


def name_of(value: object) -> object:
    """Return the name of a value that earlier versions had: torchvision's magnitude, 0 for none; others unchanged."""
    text = str(value) if type(value) is int else value
    if isinstance(text, str) and _NUMBER.fullmatch(text):
        return f"torchvision-{int(text)}" if int(text) else NONE
    return text


def rand_augment_of(name: str, channels: int, mean: Sequence[float] | None = None) -> Change | None:
    """Return the RandAugment of a name, for images of 1 or 3 channels; None for `NONE`.

    timm's fills pixels from outside the image with `mean`, the mean of each channel on a scale of 0 to 1, and
    torchvision's with black.

    Raises:
        UserError: if the name is not allowed.
    """
    if name == NONE:
        return None
    found = _TORCHVISION.fullmatch(name)
    if found is not None and int(found[1]) <= GREATEST_MAGNITUDE:
        magnitude = int(found[1])
        return lambda image, word: rand_augment(image, magnitude, word)
    timms = TimmRandAugment.parse(name)
    if timms is None:
        raise UserError(f"augment.rand_augment is {name}; allowed: {FORMS}")
    fill = [min(255, round(255 * value)) for value in mean or [_GRAY] * channels]
    return lambda image, word: timms(image, word, fill)
