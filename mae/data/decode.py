"""Bytes of an image -> uint8 tensor, by an allow-list of formats."""

import io
import warnings

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mae.errors import BadImageError

# Without the list Pillow would also try its EPS, FITS and other parsers on whatever a shard holds.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_NPY_MAGIC = b"\x93NUMPY"


def decode(data: bytes, channels: int) -> UInt8[Tensor, "channels height width"]:
    """Decode an image, turned upright by its EXIF orientation, into `channels` planes.

    Gray becomes three equal planes and colour becomes luma (ITU-R 601-2) as Pillow converts them; 16-bit
    gray keeps its upper eight bits. A `.npy` array must be uint8 [height width] or [height width channels].

    Raises:
        BadImageError: for a format that is not in `FORMATS`, a damaged or cut file, more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, or a number of channels that cannot be had.
    """
    if data.startswith(_NPY_MAGIC):
        pixels = _load_npy(data)
    else:
        with warnings.catch_warnings():
            # Pillow's other warnings, of broken EXIF blocks or odd palettes, say nothing against the pixels.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels = _load_with_pillow(data, channels)
    if pixels.shape[2] != channels:
        raise BadImageError(f"it has {pixels.shape[2]} channels, {channels} are asked for (data.channels)")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_gray(data: bytes) -> bool:
    """Whether the file itself stores a single plane of gray."""
    if data.startswith(_NPY_MAGIC):
        return int(_load_npy(data).shape[2]) == 1
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode: str = image.mode
    return mode in ("1", "L") or mode.startswith("I")


def native_channels(data: bytes) -> int:
    """Planes to decode this file into when nobody has asked for a number: 3, or those of a `.npy` array."""
    return _load_npy(data).shape[2] if data.startswith(_NPY_MAGIC) else 3


def _load_with_pillow(data: bytes, channels: int) -> NDArray[np.uint8]:
    if channels not in _MODES:
        raise BadImageError(f"{channels} channels can only be read from .npy files; allowed here: 1, 3, 4")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":
                raise BadImageError("floating-point pixels have no defined range")
            plain = _upper_byte(image) if image.mode.startswith("I") else image
            pixels = np.array(plain.convert(_MODES[channels]))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"it is no intact file of {', '.join(FORMATS)}") from None
    except Exception as error:  # whatever a decoder makes of hostile bytes: the image is bad, and is named
        raise BadImageError(f"{type(error).__name__}: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


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
