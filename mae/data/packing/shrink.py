"""Images made smaller before they are packed: less quality, but less disk space and faster reading."""

import io
from enum import Enum
from typing import NamedTuple

from PIL import Image

from mae.data.images.decode import FORMATS, decode_pixels, is_wide_colour

# Channels of the modes that JPEG stores directly; not among them: 16-bit gray, palettes, CMYK and alpha.
_CHANNELS = {"L": 1, "RGB": 3}


class Outcome(Enum):
    """Result for one image."""

    SMALL = "small"
    """Image unchanged, because it is small enough or its header cannot be read."""
    SHRUNK = "shrunk"
    """Image made smaller."""
    UNSUITED = "unsuited"
    """Large image unchanged, because its kind is never made smaller."""


class _Header(NamedTuple):
    format: str | None
    mode: str
    size: tuple[int, int]
    icc_profile: bytes | None
    is_plain: bool


def shrink(data: bytes, short_side: int, quality: int) -> tuple[bytes, Outcome]:
    """Reduce an image whose short side exceeds `short_side` pixels, and return it as a JPEG of the given quality.

    Pillow's antialiased Lanczos filter reduces it, because it keeps training crops closest to those of the
    original. Chroma is 4:2:0. A JPEG that is not too large is encoded again, and kept byte for byte if that saves
    nothing. The EXIF orientation is applied, the colour profile is kept, and other metadata are dropped. Unchanged
    are all other small images, 16-bit images, palettes, CMYK, alpha, several frames and .npy arrays.

    Raises:
        BadImageError: if an image that must be encoded again cannot be decoded.
    """
    header = _header(data)
    is_large = header is not None and min(header.size) > short_side
    if header is None or not (is_large or header.format == "JPEG"):
        return data, Outcome.SMALL
    if not header.is_plain or is_wide_colour(data):
        return data, Outcome.UNSUITED if is_large else Outcome.SMALL
    pixels = decode_pixels(data, _CHANNELS[header.mode])
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    if is_large:
        scale = short_side / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling="4:2:0", icc_profile=header.icc_profile)
    if not is_large and len(buffer.getvalue()) >= len(data):
        return data, Outcome.SMALL
    return buffer.getvalue(), Outcome.SHRUNK


def _header(data: bytes) -> _Header | None:
    """Read the header of an image; None if that fails, so that the decoder reports the error."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _Header(
                format=image.format,
                mode=image.mode,
                size=image.size,
                icc_profile=image.info.get("icc_profile"),
                is_plain=image.mode in _CHANNELS
                and "transparency" not in image.info
                and getattr(image, "n_frames", 1) == 1,
            )
    except Exception:  # a damaged header raises errors of many kinds
        return None
