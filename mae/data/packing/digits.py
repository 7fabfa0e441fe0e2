"""scikit-learn's scanned digits: 1,797 real 8x8 images that need no download.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak
1998, doi:10.24432/C50P49, CC BY 4.0).
"""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mae.data.packing.items import Item, Source
from mae.data.packing.plan import shuffled

CLASSES = tuple(str(digit) for digit in range(10))
SPLITS: Mapping[str, int] = {"train": 1097, "val": 200, "test": 500}
"""Number of images of each split. The demo's settings were chosen on val; test serves the final evaluation only."""
_MAX_PIXEL = 16
_SHUFFLE_SEED = 0


def digit_sources() -> dict[str, Source]:
    """Return each split as a source that is already shuffled."""
    return {
        split: Source("digits", iter(items), list(CLASSES), splits=tuple(SPLITS))
        for split, items in digit_splits().items()
    }


def digit_splits() -> dict[str, list[Item]]:
    """Return the images of each split as PNG files with labels, in a fixed shuffled order."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / _MAX_PIXEL)).astype(np.uint8)
    items = shuffled(
        [
            Item(f"digit {number}", "png", _png(image), int(label))
            for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True))
        ],
        _SHUFFLE_SEED,
    )
    splits, start = {}, 0
    for name, count in SPLITS.items():
        splits[name] = items[start : start + count]
        start += count
    return splits


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
