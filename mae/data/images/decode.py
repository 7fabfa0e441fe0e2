"""Bytes of an image -> uint8 pixels, by an allow-list of formats.

JPEGs are decoded by libjpeg-turbo directly (`mae.data.images.jpeg`), all others, and JPEGs that are in any way
unusual, by Pillow. Both give the same pixels; which one does it changes speed only.
"""

import io
import re
import warnings

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mae.data.images import jpeg
from mae.errors import BadImageError

# Without the list Pillow would also try its EPS, FITS and other parsers on whatever a shard holds.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHANNELS = tuple(_MODES)
"""Numbers of planes that any image can be decoded into; a `.npy` array has its own."""
_NPY_MAGIC = b"\x93NUMPY"
_PILLOWS_MODULES = re.compile(r"PIL\.")


def decode(data: bytes, channels: int) -> UInt8[Tensor, "channels height width"]:
    """Decode an image, turned upright by its EXIF orientation, into `channels` planes: see `decode_pixels`."""
    return torch.from_numpy(np.ascontiguousarray(decode_pixels(data, channels))).permute(2, 0, 1)


def decode_pixels(data: bytes, channels: int, header: jpeg.Header | None = None) -> NDArray[np.uint8]:
    """Decode an image, turned upright by its EXIF orientation, into pixels [height width channels].

    Gray becomes equal planes and colour becomes luma (ITU-R 601-2) as Pillow converts them; alpha is dropped
    unless 4 channels are asked for; a palette becomes its colours and CMYK RGB; of 16 bits the upper eight
    are kept. A `.npy` array must be uint8 [height width] or [height width channels]. `header` is what
    `jpeg_header` gave, where that is known already.

    Raises:
        BadImageError: for a format that is not in `FORMATS`, a damaged or cut file, more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, or a number of channels that cannot be had.
    """
    if data.startswith(_NPY_MAGIC):
        pixels = _load_npy(data)
        if pixels.shape[2] != channels:
            raise BadImageError(f"it has {pixels.shape[2]} channels, {channels} are asked for (data.channels)")
        return pixels
    header = header or jpeg_header(data, channels)
    found = None if header is None else jpeg.decode_region(data, header, channels)
    return _load_with_pillow(data, channels) if found is None else found


def jpeg_header(data: bytes, channels: int) -> jpeg.Header | None:
    """The header of a JPEG that can be decoded by region; None for any other image.

    Raises:
        BadImageError: for too many pixels or a number of channels that cannot be had.
    """
    header = jpeg.read_header(data)
    if header is not None:
        _check_channels(channels)
        _check_size(header.height, header.width)
    return header


def is_gray(data: bytes) -> bool:
    """Whether the file itself stores a single plane of gray."""
    if data.startswith(_NPY_MAGIC):
        return int(_load_npy(data).shape[2]) == 1
    _silence_pillow()
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode: str = image.mode
    return mode in ("1", "L") or mode.startswith("I")


def native_channels(data: bytes) -> int:
    """Planes to decode this file into when nobody has asked for a number: 3, or those of a `.npy` array."""
    return _load_npy(data).shape[2] if data.startswith(_NPY_MAGIC) else 3


def possible_channels(data: bytes) -> tuple[int, ...]:
    """Numbers of planes that this file can be decoded into; raises as `decode` for a damaged `.npy` array."""
    return (native_channels(data),) if data.startswith(_NPY_MAGIC) else CHANNELS


def _load_with_pillow(data: bytes, channels: int) -> NDArray[np.uint8]:
    _check_channels(channels)
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            image.load()
            if image.info or image.format == "TIFF":  # else there is no EXIF block, and looking for it takes a while
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise BadImageError("floating-point pixels have no defined range")
            plain = _upper_byte(image) if image.mode.startswith("I") else image
            pixels = np.array(plain if plain.mode == _MODES[channels] else plain.convert(_MODES[channels]))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"it is no intact file of {', '.join(FORMATS)}") from None
    except Exception as error:  # whatever a decoder makes of hostile bytes: the image is bad, and is named
        raise BadImageError(f"{type(error).__name__}: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _check_channels(channels: int) -> None:
    if channels not in _MODES:
        raise BadImageError(f"{channels} channels can only be read from .npy files; allowed here: 1, 3, 4")


def _check_size(height: int, width: int) -> None:
    """By the header alone, before any memory is taken for the pixels."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and height * width > most:
        raise BadImageError(
            f"its header says {width}x{height} pixels; allowed: {most} in all (PIL.Image.MAX_IMAGE_PIXELS)"
        )


def _silence_pillow() -> None:
    """Its warnings, of broken EXIF blocks or odd palettes, say nothing against the pixels.

    For good and for the whole process: `warnings.catch_warnings` is not for threads, of which several decode.
    """
    if not warnings.filters or warnings.filters[0][3] != _PILLOWS_MODULES:
        warnings.filterwarnings("ignore", module=_PILLOWS_MODULES.pattern)


def _upper_byte(image: Image.Image) -> Image.Image:
    """16-bit gray -> 8-bit gray; Pillow's own conversion would clip everything above 255 to white."""
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


def _load_npy(data: bytes) -> NDArray[np.uint8]:
    try:
        array: NDArray[np.uint8] = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # hostile headers also end in memory, overflow and tokenizer errors
        raise BadImageError(f"no readable .npy array: {error}") from None
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise BadImageError(
            f".npy array is {array.dtype} {list(array.shape)}; allowed: uint8 [height width] or [height width channels]"
        )
    return array if array.ndim == 3 else array[:, :, None]
