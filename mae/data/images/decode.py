"""Decoding of images into uint8 pixels, for an allow-list of formats.

libjpeg-turbo decodes ordinary JPEGs directly (`mae.data.images.jpeg`); Pillow decodes unusual JPEGs and all other
formats. Both give the same pixels and differ only in speed.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mae.data.images import jpeg
from mae.data.images.levels import SIXTEEN_BITS, ValueRange, WideValues, is_of_16_bits, to_levels
from mae.errors import BadImageError

# Without this list Pillow would also try its EPS, FITS and other parsers on the files of a shard.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHANNELS = tuple(_MODES)
"""Numbers of channels that any image except a `.npy` array can be decoded into."""
# An array may have many channels; its bytes are bounded as those of an image with this many.
_MAX_NPY_PLANES = 4
_NPY_MAGIC, _PNG_MAGIC, _TIFF_MAGICS = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_BIT_DEPTH = 24  # place of the byte in the file
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # tags of TIFF, and a value of the second
_WIDE_MODES = {"I": "32-bit integers", "F": "floating-point numbers"}
_PILLOW_MODULES = re.compile(r"PIL\.")


def decode(data: bytes, channels: int, value_range: ValueRange = None) -> UInt8[Tensor, "channels height width"]:
    """Decode an image into `channels` planes, turned upright by its EXIF orientation; see `decode_pixels`."""
    pixels = decode_pixels(data, channels, value_range)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def decode_pixels(
    data: bytes, channels: int, value_range: ValueRange = None, header: jpeg.Header | None = None
) -> NDArray[np.uint8]:
    """Decode an image into pixels [height width channels], turned upright by its EXIF orientation.

    As in Pillow, gray becomes equal planes and colour becomes luma (ITU-R 601-2). Alpha is dropped unless `channels`
    is 4. A palette becomes its colours, and CMYK becomes RGB. A `.npy` array is [height width] or [height width
    channels]. `header` is the result of `jpeg_header`, if known.

    Values of more than 8 bits are divided into 256 levels by `value_range` (see `levels.to_levels`). Without it, the
    upper eight of 16 bits are kept, and other wide images are bad.

    Raises:
        BadImageError: for a format that is not in `FORMATS`, a damaged or truncated file, more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (of an array: four times as many bytes), or an impossible number of
            channels. So decoding takes at most 24 bytes for each of these pixels: 2.1 GB.
    """
    if data.startswith(_NPY_MAGIC):
        array = _load_npy(data)
        if array.shape[2] != channels:
            raise BadImageError(f"it has {array.shape[2]} channels, but data.channels is {channels}")
        if array.dtype == np.uint8:
            return array
        if value_range is None:
            raise BadImageError(f"it is a .npy array of {array.dtype}, whose range is not known; set data.value_range")
        return to_levels(array, value_range)
    header = header or jpeg_header(data, channels)
    found = None if header is None else jpeg.decode_region(data, header, channels)
    return _load_with_pillow(data, channels, value_range) if found is None else found


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
    return mode in ("1", "L") or mode.startswith(("I", "F"))


def native_channels(data: bytes) -> int:
    """Return the default number of channels to decode this file into: 3, or that of a `.npy` array."""
    return _load_npy(data).shape[2] if data.startswith(_NPY_MAGIC) else 3


def possible_channels(data: bytes) -> tuple[int, ...]:
    """Return the numbers of channels that this file can be decoded into; raise as `decode` for a damaged `.npy`."""
    return (native_channels(data),) if data.startswith(_NPY_MAGIC) else CHANNELS


def wide_values(data: bytes) -> NDArray[Any] | None:
    """Return the values [height width planes] of an array or a gray image of more than 8 bits; None for any other.

    Raises:
        BadImageError: as `decode_pixels`.
    """
    if data.startswith(_NPY_MAGIC):
        array = _load_npy(data)
        return None if array.dtype == np.uint8 else array
    may_be = _is_wide_png(data) or (data.startswith(_TIFF_MAGICS) and _of_header(data, _is_wide_gray))
    return _of_image(data, _wide_plane) if may_be else None


def count_wide(found: WideValues, data: bytes) -> bool:
    """Count the values of an array or a gray image of more than 8 bits; return False for any other image.

    Raises:
        BadImageError: as `decode_pixels`; also if a value is not a number.
    """
    values = wide_values(data)
    if values is not None:
        found.add(values, has_default=is_of_16_bits(values) and not data.startswith(_NPY_MAGIC))
    return values is not None


def is_wide_colour(data: bytes) -> bool:
    """Return whether this is a colour image of 16 bits, of which Pillow reads the upper eight only.

    Raises:
        BadImageError: as `decode_pixels`.
    """
    if data.startswith(_TIFF_MAGICS):
        return _of_header(data, _is_wide_colour_tiff)
    return _is_wide_png(data) and data[_PNG_BIT_DEPTH + 1 : _PNG_BIT_DEPTH + 2] != b"\0"


def _load_with_pillow(data: bytes, channels: int, value_range: ValueRange) -> NDArray[np.uint8]:
    _check_channels(channels)
    if value_range not in (None, SIXTEEN_BITS) and is_wide_colour(data):
        raise BadImageError("it is a colour image of 16 bits, which data.value_range cannot divide; convert it to .npy")

    def pixels(image: Image.Image) -> NDArray[np.uint8]:
        wide = _wide_plane(image)
        if wide is not None:
            what = f"a {image.format} of {_WIDE_MODES.get(image.mode, '16 bits')}"
            image = _image_of(_levels(wide, value_range, what))
        plain = np.array(image if image.mode == _MODES[channels] else image.convert(_MODES[channels]))
        return plain if plain.ndim == 3 else plain[:, :, None]

    return _of_image(data, pixels)


def _is_wide_colour_tiff(image: Image.Image) -> bool:
    return not _is_wide_gray(image) and _tiff_tag(image, _BITS_PER_SAMPLE, 8) > 8


def _image_of(levels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    of_tiff: Any = image
    value: int = max(of_tiff.tag_v2.get(tag, (default,)))
    return value


def _is_wide_gray(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _wide_plane(image: Image.Image) -> NDArray[Any] | None:
    """Return the values of a gray image of more than 8 bits: [height width 1]; None for any other image."""
    if not _is_wide_gray(image):
        return None
    values = np.asarray(image)[:, :, None]
    # Pillow reads unsigned integers of 32 bits as signed ones.
    is_tiff = image.format == "TIFF" and image.mode == "I"
    is_unsigned = is_tiff and _tiff_tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED
    return values.view(np.uint32) if is_unsigned else values


def _is_wide_png(data: bytes) -> bool:
    return data.startswith(_PNG_MAGIC) and data[_PNG_BIT_DEPTH : _PNG_BIT_DEPTH + 1] == b"\x10"


def _levels(values: NDArray[Any], value_range: ValueRange, what: str) -> NDArray[np.uint8]:
    if value_range is None:
        if not is_of_16_bits(values):
            raise BadImageError(f"it is {what}, whose range is not known; set data.value_range")
        value_range = SIXTEEN_BITS
    return to_levels(values, value_range)


Result = TypeVar("Result")


def _of_image(data: bytes, read: Callable[[Image.Image], Result]) -> Result:
    """Return what `read` makes of the decoded, upright image.

    Raises:
        BadImageError: if the image is too large or damaged, or of a format that is not allowed.
    """

    def decoded(image: Image.Image) -> Result:
        image.load()
        if image.info or image.format == "TIFF":  # others have no EXIF block, and the search is slow
            ImageOps.exif_transpose(image, in_place=True)
        return read(image)

    return _of_header(data, decoded)


def _of_header(data: bytes, read: Callable[[Image.Image], Result]) -> Result:
    """Return what `read` makes of an image whose pixels are not decoded yet; raise as `_of_image`."""
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            return read(image)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"it is not a valid image; allowed formats: {', '.join(FORMATS)}") from None
    except Exception as error:  # hostile bytes can raise any error in a decoder; the image is bad
        raise BadImageError(f"{type(error).__name__}: {error}") from None


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


def _load_npy(data: bytes) -> NDArray[Any]:
    if len(data) > _MAX_NPY_PLANES * (Image.MAX_IMAGE_PIXELS or len(data)):
        raise BadImageError(
            f"its .npy array has {len(data)} bytes; allowed: {_MAX_NPY_PLANES} times PIL.Image.MAX_IMAGE_PIXELS"
        )
    try:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # hostile headers also raise memory, overflow and tokenizer errors
        raise BadImageError(f"it is not a valid .npy array: {error}") from None
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise BadImageError(
            f".npy array is {array.dtype} {list(array.shape)}; allowed: integers or floating-point numbers [height "
            "width] or [height width channels]"
        )
    return array if array.ndim == 3 else array[:, :, None]
