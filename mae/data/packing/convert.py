"""Image formats that can be packed, and conversion to PNG of those that shards do not hold: GIF, AVIF and HEIC.

The allow-list here is separate from that of the decoder in training (`mae.data.images.decode.FORMATS`), which never
sees these formats.
"""

import io
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import PIL
from PIL import Image, ImageOps, UnidentifiedImageError, features

from mae.data.scan import IMAGE_EXTENSIONS
from mae.errors import BadImageError, UserError

RENAMED = {"jpeg": "jpg", "jfif": "jpg", "jpe": "jpg"}
"""Extensions that are changed in shards: timm finds only jpg, png and webp."""
CONVERTED = {"gif": "GIF", "avif": "AVIF", "heic": "HEIF", "heif": "HEIF", "hif": "HEIF"}
"""Pillow's format of each extension that is converted to PNG."""


@cache
def missing_reader(extension: str) -> str:
    """Return how to make an extension convertible; empty if it is so already, or never will be."""
    kind = CONVERTED.get(extension)
    if kind == "HEIF" and find_spec("pillow_heif") is None:
        return f"pip install 'mae-pretraining[heic]' to pack .{extension}"
    if kind == "AVIF" and not features.check("avif"):
        return f"install a Pillow that reads AVIF to pack .{extension}"
    return ""


def is_image(extension: str) -> bool:
    """Return whether files with this extension can be packed on this machine."""
    if extension in CONVERTED:
        return not missing_reader(extension)
    return extension in IMAGE_EXTENSIONS or extension in RENAMED


def readers(extensions: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that convert these extensions, and thus determine the bytes."""
    kinds = {CONVERTED[extension] for extension in extensions if extension in CONVERTED}
    heif = {"pillow-heif": version("pillow-heif")} if "HEIF" in kinds else {}
    return ({"Pillow": PIL.__version__} if kinds else {}) | heif


def to_png(data: bytes, extension: str) -> bytes:
    """Return the first frame as a PNG of the same pixels, turned upright; alpha, palette and colour profile are kept.

    Raises:
        BadImageError: if the image is damaged, of another format, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
        UserError: if this machine cannot read the format.
    """
    if remedy := missing_reader(extension):
        raise UserError(f"{remedy} on each machine that packs")
    kind = CONVERTED[extension]
    buffer = io.BytesIO()
    try:
        if kind == "HEIF":
            from pillow_heif import register_heif_opener  # noqa: PLC0415 (an extra)

            register_heif_opener()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=(kind,)) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                image.save(buffer, format="PNG")
    except UnidentifiedImageError:
        raise BadImageError(f"it is not a valid {kind} image") from None
    except Exception as error:  # hostile bytes can raise any error in a decoder
        raise BadImageError(f"{type(error).__name__}: {error}") from None
    return buffer.getvalue()
