"""Decoding of images into uint8 pixels, for an allow-list of formats.

libjpeg-turbo decodes ordinary JPEGs directly (`mae.data.images.jpeg`); Pillow decodes unusual JPEGs and all other
formats. Both give the same pixels and differ only in speed.
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

# Without this list Pillow would also try its EPS, FITS and other parsers on the files of a shard.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHANNELS = tuple(_MODES)
"""Numbers of channels that any image except a `.npy` array can be decoded into."""
# An array may have many channels; its bytes are bounded as those of an image with this many.
_MAX_NPY_PLANES = 4
_BLOCK_VALUES = 1 << 18
_NPY_MAGIC = b"\x93NUMPY"
_PILLOW_MODULES = re.compile(r"PIL\.")


def decode(data: bytes, channels: int) -> UInt8[Tensor, "channels height width"]:
    """Decode an image into `channels` planes, turned upright by its EXIF orientation; see `decode_pixels`."""
    return torch.from_numpy(np.ascontiguousarray(decode_pixels(data, channels))).permute(2, 0, 1)


def decode_pixels(data: bytes, channels: int, header: jpeg.Header | None = None) -> NDArray[np.uint8]:
    """Decode an image into pixels [height width channels], turned upright by its EXIF orientation.

    As in Pillow, gray becomes equal planes and colour becomes luma (ITU-R 601-2). Alpha is dropped unless `channels`
    is 4. A palette becomes its colours, and CMYK becomes RGB. Of 16 bits the upper eight are kept. A `.npy` array
    must be uint8 [height width] or [height width channels]. `header` is the result of `jpeg_header`, if known.

    Raises:
        BadImageError: for a format that is not in `FORMATS`, a damaged or truncated file, more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (of an array: four times as many bytes), or an impossible number of
            channels. So decoding takes at most 24 bytes for each of these pixels: 2.1 GB.
    """
    if data.startswith(_NPY_MAGIC):
        pixels = _load_npy(data)
        if pixels.shape[2] != channels:
            raise BadImageError(f"it has {pixels.shape[2]} channels, but data.channels is {channels}")
        return pixels
    header = header or jpeg_header(data, channels)
    found = None if header is None else jpeg.decode_region(data, header, channels)
    return _load_with_pillow(data, channels) if found is None else found


def jpeg_header(data: bytes, channels: int) -> jpeg.Header | None:
    """Read the header of a JPEG that can be decoded by region; return None for any other image.

    Raises:
        BadImageError: for too many pixels or an impossible number of channels.
    """
    header = jpeg.read_header(data)
    if header is not None:
        _check_channels(channels)
        _check_size(header.height, header.width)
    return header


def is_gray(data: bytes) -> bool:
    """Return whether the file stores a single gray plane."""
    if data.startswith(_NPY_MAGIC):
        return int(_load_npy(data).shape[2]) == 1
    _silence_pillow()
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode: str = image.mode
    return mode in ("1", "L") or mode.startswith("I")


def native_channels(data: bytes) -> int:
    """Return the default number of channels to decode this file into: 3, or that of a `.npy` array."""
    return _load_npy(data).shape[2] if data.startswith(_NPY_MAGIC) else 3


def possible_channels(data: bytes) -> tuple[int, ...]:
    """Return the numbers of channels that this file can be decoded into; raise as `decode` for a damaged `.npy`."""
    return (native_channels(data),) if data.startswith(_NPY_MAGIC) else CHANNELS


def _load_with_pillow(data: bytes, channels: int) -> NDArray[np.uint8]:
    _check_channels(channels)
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            image.load()
            if image.info or image.format == "TIFF":  # others have no EXIF block, and the search is slow
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise BadImageError("floating-point pixels have no defined range")
            plain = _upper_byte(image) if image.mode.startswith("I") else image
            pixels = np.array(plain if plain.mode == _MODES[channels] else plain.convert(_MODES[channels]))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"it is not a valid image; allowed formats: {', '.join(FORMATS)}") from None
    except Exception as error:  # hostile bytes can raise any error in a decoder; the image is bad
        raise BadImageError(f"{type(error).__name__}: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _check_channels(channels: int) -> None:
    if channels not in _MODES:
        raise BadImageError(f"{channels} channels can only be read from .npy files; allowed here: 1, 3, 4")


def _check_size(height: int, width: int) -> None:
    """Refuse an image that is too large before memory for its pixels is allocated."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and height * width > most:
        raise BadImageError(
            f"its header gives {width}x{height} pixels; allowed: {most} in total (PIL.Image.MAX_IMAGE_PIXELS)"
        )


def _silence_pillow() -> None:
    """Silence Pillow's warnings for the whole process; broken EXIF blocks or odd palettes do not affect the pixels.

    `warnings.catch_warnings` is not safe here because several threads decode.
    """
    if not warnings.filters or warnings.filters[0][3] != _PILLOW_MODULES:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)


def _upper_byte(image: Image.Image) -> Image.Image:
    """Convert 16-bit gray to 8-bit gray; Pillow's own conversion would clip values above 255 to white."""
    wide = np.asarray(image)
    values, upper = wide.reshape(-1), np.empty(wide.size, dtype=np.uint8)
    for start in range(0, len(values), _BLOCK_VALUES):  # a copy of all as wide numbers would be large
        part = slice(start, start + _BLOCK_VALUES)
        upper[part] = values[part].clip(0, 65535) >> 8
    return Image.fromarray(upper.reshape(wide.shape))


def _load_npy(data: bytes) -> NDArray[np.uint8]:
    if len(data) > _MAX_NPY_PLANES * (Image.MAX_IMAGE_PIXELS or len(data)):
        raise BadImageError(
            f"its .npy array has {len(data)} bytes; allowed: {_MAX_NPY_PLANES} times PIL.Image.MAX_IMAGE_PIXELS"
        )
    try:
        array: NDArray[np.uint8] = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # hostile headers also raise memory, overflow and tokenizer errors
        raise BadImageError(f"it is not a valid .npy array: {error}") from None
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise BadImageError(
            f".npy array is {array.dtype} {list(array.shape)}; allowed: uint8 [height width] or [height width channels]"
        )
    return array if array.ndim == 3 else array[:, :, None]
