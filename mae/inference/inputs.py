"""Images as a user of a model has them: paths, encoded bytes, PIL images, arrays and tensors."""

import io
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mae.data.images.augment import eval_view
from mae.data.images.decode import CHANNELS, decode
from mae.errors import BadImageError, UserError
from mae.files import open_regular
from mae.models.description import ModelDescription

Picture = str | PathLike[str] | bytes | Image.Image | NDArray[np.generic] | Tensor
"""One image: a path, the bytes of an image file, a PIL image, an array [height width] or [height width channels], or a
tensor [height width] or [channels height width]. Floating-point pixels are from 0 to 1."""
Pictures = Picture | Sequence[Picture]
"""One image, a sequence of them, an array [images height width channels] or a tensor [images channels height width]."""

_BATCH_AXES = 4
# Modes that TIFF stores as they are, and others with an alpha plane; what is left has no more than an RGB image has.
_STORED_AS_THEY_ARE = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "I;16L", "I;16B", "F")
_WITH_ALPHA = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}


def each_of(images: Pictures) -> Iterable[Picture]:
    """Return the single images of `images`."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == _BATCH_AXES else [images]
    return [images] if isinstance(images, str | PathLike | bytes | Image.Image) else images


def encoded(image: Picture, has_range: bool = False) -> bytes:
    """Return an image as the bytes of an image file, so that all images are decoded by the same rules.

    A PIL image is turned upright by its EXIF orientation. An array or tensor of one, three or four channels becomes an
    image that can be decoded into any of these numbers; any other becomes a `.npy` array. Floating-point pixels are
    from 0 to 1; but if the model `has_range`, they are in its units, as its images of more than 8 bits are.

    Raises:
        UserError: if a file cannot be read, or an array has other axes or values.
        BadImageError: if a PIL image is damaged or closed.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | PathLike):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return _saved(image)
    return _encoded_array(image, has_range)


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}; give the path of an image file") from None


def _encoded_array(image: NDArray[np.generic] | Tensor, has_range: bool) -> bytes:
    array: NDArray[Any] = _array_of(image) if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype == object and not isinstance(image, np.ndarray):
        raise UserError(
            f"an image is a {type(image).__name__}; allowed: a path, bytes, a PIL image, an array or a tensor"
        )
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(
            f"an image has the shape {list(np.shape(image))}; allowed: arrays [height width channels], tensors "
            "[channels height width], and both [height width]"
        )
    if array.dtype.kind not in "uif":
        raise UserError(f"an image has pixels of type {array.dtype}; allowed: whole or floating-point numbers")
    if array.dtype.kind == "f" and not has_range:
        array = _to_bytes(array)
    if array.dtype != np.uint8 and not has_range:
        raise UserError(
            f"an image has pixels of type {array.dtype}, whose greatest value is not known; allowed: uint8 from 0 to "
            "255, or floating-point numbers from 0 to 1"
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype == np.uint8 and channels in CHANNELS:
        return _saved(Image.fromarray(array.squeeze(2) if array.ndim == 3 and channels == 1 else array))
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _array_of(image: Tensor) -> NDArray[np.generic]:
    """Return a tensor [height width] or [channels height width] as an array with the channels last."""
    # NumPy has none of the short floating-point types of torch but one, and float32 holds their values.
    is_short = image.is_floating_point() and image.dtype not in (torch.float32, torch.float64)
    try:
        array: NDArray[np.generic] = (image.detach().float() if is_short else image.detach()).cpu().numpy()
    except (TypeError, RuntimeError) as error:  # it is sparse, quantised or without values
        reason = str(error).partition("\n")[0]
        raise UserError(f"an image is a tensor that cannot be read ({reason}); give its pixels") from None
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _to_bytes(array: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return floating-point pixels from 0 to 1 as the nearest of 256 levels."""
    if not (array.min() >= 0 and array.max() <= 1):
        raise UserError(
            f"floating-point pixels are from {array.min():g} to {array.max():g}; allowed: 0 to 1, not normalised, "
            "because the model normalises them itself"
        )
    levels: NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
    return levels


def _saved(image: Image.Image) -> bytes:
    """Return the bytes of a file with the pixels of an image, turned upright.

    TIFF is fast, but has no transparent colour; compressed as the file that the image came from, it may change pixels.
    """
    buffer = io.BytesIO()
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode not in _STORED_AS_THEY_ARE:
            image = image.convert(_WITH_ALPHA.get(image.mode, "RGB"))
        if image.has_transparency_data and image.mode in ("1", "L", "P", "RGB"):
            image.save(buffer, format="PNG", compress_level=1)
        else:
            image.save(buffer, format="TIFF", compression="raw")
    except (AssertionError, AttributeError):  # Pillow's, of various versions, where it finds no open file
        raise BadImageError("the file of a PIL image was closed before its pixels were read (image.load())") from None
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise BadImageError(f"the pixels of a PIL image of mode {image.mode} cannot be read: {error}") from None
    return buffer.getvalue()


def view_of(data: bytes, description: ModelDescription) -> UInt8[Tensor, "channels height width"]:
    """Decode the bytes of an image file, resize them and crop them at the centre, as the model of a description needs.

    Raises:
        BadImageError: if the image is damaged or of a format that is not allowed.
    """
    image = decode(data, description.channels, description.value_range)
    return eval_view(image, description.image_size, description.crop_pct)
