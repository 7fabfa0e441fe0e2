"""Decoding of a sample of the images, with the rules by which training decodes them."""

import io
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import torch
from PIL import Image

from mae.data.images.decode import FORMATS, count_wide, decode, is_gray, native_channels, wide_values
from mae.data.images.resizing import resized
from mae.data.sample_images import NamedImage
from mae.data.statistics import SetPixels
from mae.errors import BadImageError, UserError
from mae.proposal.facts import ImageFacts

IMAGES = 256
"""Most images of the sample."""
# Large images take long; these are enough for medians.
_MOST_SECONDS, _ENOUGH_IMAGES = 15.0, 24
_VIEW = (128, 128)
_NPY, _JPEG = b"\x93NUMPY", b"\xff\xd8"


def look_at(images: Iterable[NamedImage]) -> ImageFacts:
    """Decode images one after the other until there are no more, or it has taken long enough."""
    pixels, planes, sizes, bad = SetPixels(), Counter[int](), list[tuple[int, int]](), list[str]()
    decoding, viewing = list[float](), list[float]()
    transparent = arrays = 0
    began = time.perf_counter()
    for name, image in images:
        try:
            if isinstance(image, UserError):
                raise image
            size, seconds = _count(pixels, image)
            channels = 1 if is_gray(image) else native_channels(image)
            transparent += _is_transparent(image)
        except (BadImageError, UserError) as error:
            bad.append(f"{name} ({error})")
            continue
        planes[channels] += 1
        arrays += image.startswith(_NPY)
        sizes.append(size)
        decoding.append(seconds)
        viewing.append(_time_of_view(size, channels))
        if time.perf_counter() - began > _MOST_SECONDS and len(sizes) >= _ENOUGH_IMAGES:
            break
    return ImageFacts(
        sampled=len(sizes) + len(bad),
        sizes=tuple(sizes),
        planes=dict(planes),
        transparent=transparent,
        arrays=arrays,
        wide=pixels.wide,
        statistics=pixels.statistics() if sizes else None,
        measured=len(sizes),
        bad=tuple(bad),
        decode_seconds=statistics.median(decoding) if decoding else 0.0,
        view_seconds=statistics.median(viewing) if viewing else 0.0,
    )


def _count(pixels: SetPixels, image: bytes) -> tuple[tuple[int, int], float]:
    """Count one image; return its height and width, and the seconds that decoding took."""
    began = time.perf_counter()
    if count_wide(pixels.wide, image):
        seconds, values = time.perf_counter() - began, wide_values(image)
        pixels.images += 1
        assert values is not None
        return (values.shape[0], values.shape[1]), seconds
    decoded = decode(image, native_channels(image))
    seconds = time.perf_counter() - began
    pixels.add(decoded, is_gray(image))
    return (decoded.shape[1], decoded.shape[2]), seconds


def _time_of_view(size: tuple[int, int], channels: int) -> float:
    """Return the seconds that it takes to resize an image of this size."""
    image = torch.zeros(*size, channels, dtype=torch.uint8).numpy()
    began = time.perf_counter()
    resized(image, _VIEW)
    return time.perf_counter() - began


def _is_transparent(data: bytes) -> bool:
    """Return whether the alpha of an image is not 1 everywhere."""
    if data.startswith((_NPY, _JPEG)):
        return False
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    with suppress(BadImageError):
        return has_alpha and int(decode(data, 4)[3].min()) < 255
    return False
