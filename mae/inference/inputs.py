"""Images as a user of a model has them: paths, encoded bytes, PIL images, arrays and tensors."""

import io
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mae.data.images.augment import eval_view
from mae.data.images.decode import CHANNELS, decode
from mae.errors import UserError
from mae.files import open_regular
from mae.models.description import ModelDescription

Picture = str | PathLike[str] | bytes | Image.Image | NDArray[np.generic] | Tensor
"""One image: a path, the bytes of an image file, a PIL image, an array [height width] or [height width channels], or a
tensor [height width] or [channels height width]. Floating-point pixels are from 0 to 1."""
Pictures = Picture | Sequence[Picture]
"""One image, a sequence of them, an array [images height width channels] or a tensor [images channels height width]."""

_BATCH_AXES = 4
_STORED_AS_THEY_ARE = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "I;16L", "I;16B", "F")


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
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | PathLike):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return _saved(ImageOps.exif_transpose(image))
    return _encoded_array(image, has_range)


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}; give the path of an image file") from None


def _encoded_array(image: NDArray[np.generic] | Tensor, has_range: bool) -> bytes:
    if isinstance(image, Tensor):
        # NumPy has no bfloat16.
        array = (image.detach().float() if image.is_floating_point() else image.detach()).cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    else:
        array = np.asarray(image)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(
            f"an image has the shape {list(image.shape)}; allowed: arrays [height width channels], tensors "
            "[channels height width], and both [height width]"
        )
    if array.dtype.kind not in "buif":
        raise UserError(f"an image has pixels of type {array.dtype}; allowed: whole or floating-point numbers")
    if array.dtype.kind == "f" and not has_range:
        array = _to_bytes(array)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype == np.uint8 and channels in CHANNELS:
        return _saved(Image.fromarray(array.squeeze(2) if array.ndim == 3 and channels == 1 else array))
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


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
    # TIFF stores the pixels of these modes as they are; others have no more than an RGB image has.
    if image.mode not in _STORED_AS_THEY_ARE:
        image = image.convert("RGB")
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="TIFF")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"a PIL image of mode {image.mode} cannot be used ({error}); convert it to RGB first") from None
    return buffer.getvalue()


def view_of(data: bytes, description: ModelDescription) -> UInt8[Tensor, "channels height width"]:
    """Decode the bytes of an image file, resize them and crop them at the centre, as the model of a description needs.

    Raises:
        BadImageError: if the image is damaged or of a format that is not allowed.
    """
    image = decode(data, description.channels, description.value_range)
    return eval_view(image, description.image_size, description.crop_pct)
