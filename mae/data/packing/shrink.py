"""Images made smaller before they are packed, in pixels and in bytes: quality traded for disk space and speed."""

import io
from enum import Enum
from typing import NamedTuple

from PIL import Image

from mae.data.images.decode import FORMATS, decode_pixels

# The modes that a JPEG stores without another loss; 16-bit gray, palettes, CMYK and alpha are none of them.
_CHANNELS = {"L": 1, "RGB": 3}


class Outcome(Enum):
    """What became of an image."""

    SMALL = "small"
    """It had no more pixels and bytes than asked for, or no header that can be read."""
    SHRUNK = "shrunk"
    UNSUITED = "unsuited"
    """It was large, but of a kind that is left as it is."""


class _Header(NamedTuple):
    format: str | None
    mode: str
    size: tuple[int, int]
    icc_profile: bytes | None
    is_plain: bool


def shrink(data: bytes, short_side: int, quality: int) -> tuple[bytes, Outcome]:
    """An image whose short side has more than `short_side` pixels, and any JPEG, as a smaller JPEG.

    Reduced with Pillow's antialiased Lanczos filter, which keeps the crops of training closest to those of the
    original, and written with 4:2:0 chroma. A JPEG that is not too large is only written anew, and stays byte for byte
    where that saves nothing; so does every other file that is not too large. The EXIF orientation is applied, the
    colour profile kept, all other metadata dropped. 16-bit gray, palettes, CMYK, alpha, several frames and .npy
    arrays are left as they are.

    Raises:
        BadImageError: if an image that is to be written anew cannot be decoded.
    """
    header = _header(data)
    is_large = header is not None and min(header.size) > short_side
    if header is None or not (is_large or header.format == "JPEG"):
        return data, Outcome.SMALL
    if not header.is_plain:
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
    """What the first bytes of an image say; None if they say nothing, which is for the decoder to complain of."""
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
    except Exception:  # as many kinds of error as there are ways to damage a header
        return None
