"""JPEG header and pixels of a region, at full or reduced size, by libjpeg-turbo.

The pixels equal those of Pillow; a file for which that is not certain is left to Pillow.
"""

import re
import struct
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from mae.data.images import turbojpeg
from mae.errors import BadImageError

SCALES = (8, 4, 2, 1)
"""Factors by which libjpeg can reduce an image while it decodes, at the cost of a few decibels."""

_COLOUR_SPACE = {1: "GRAY", 3: "RGB", 4: "RGBA"}
# Words of libjpeg's warnings about a damaged scan. Pillow ignores these warnings and gives half-gray or shifted images.
_DAMAGE_WARNINGS = ("premature end", "bad huffman code", "bad arithmetic code", "found marker")
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_END_OF_IMAGE = b"\xff\xd9"
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ORIENTATION_TAG, _SHORT = 274, 3
_SIDEWAYS = range(5, 9)


class _OddError(Exception):
    """Signal that the markers or the EXIF block need a fuller parser."""


class Header(NamedTuple):
    """Header of a JPEG."""

    height: int
    width: int
    gray: bool
    """Whether the file stores a single plane; otherwise it is RGB or YCbCr."""
    orientation: int
    """EXIF orientation, 1 to 8: how to turn the stored image upright."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        return (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)


class Box(NamedTuple):
    """Rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def read_header(data: bytes) -> Header | None:
    """Read the header of an 8-bit gray or colour JPEG; return None for any other or unusual file."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        orientation = _orientation(data)
    except (ValueError, IndexError, struct.error, _OddError):
        return None
    if colour_space not in ("Gray", "YCbCr", "RGB"):
        return None
    return Header(height, width, colour_space == "Gray", orientation)


def decode_region(
    data: bytes, header: Header, channels: int, region: Box | None = None, scale: int = 1
) -> NDArray[np.uint8] | None:
    """Decode a region, given in pixels of the upright image reduced `scale` times: [height width channels].

    Colour becomes gray by Pillow's luma (ITU-R 601-2) and gray becomes three equal planes. Return None if
    libjpeg-turbo refuses something that Pillow may accept.

    Raises:
        BadImageError: if the file is truncated or its scan is damaged.
    """
    planes = 3 if channels == 1 and not header.gray else channels
    pixels = None
    library = turbojpeg.find()
    # TurboJPEG stops below the region, so it would not notice a truncated file.
    if library is not None and region is not None and header.orientation == 1 and data.endswith(_END_OF_IMAGE):
        pixels = library.decode_region(data, *region, planes, scale)
    if pixels is None:
        whole = _decode(data, header, planes, scale)
        if whole is None:
            return None
        pixels = turned(whole, header.orientation)
        if region is not None:
            pixels = cut(pixels, region)
    return pixels if planes == channels else _luma(pixels)


def cut(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """Return the part of an image [height width channels] inside a box, as a view."""
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return an upright view of a stored image [height width channels]."""
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]


def _decode(data: bytes, header: Header, channels: int, scale: int) -> NDArray[np.uint8] | None:
    """Decode the whole stored image; libjpeg rounds the size of a reduced image up."""
    height, width = -(-header.height // scale), -(-header.width // scale)
    buffer = np.empty((height, width, channels), dtype=np.uint8)
    reduced = {} if scale == 1 else {"min_height": height, "min_width": width, "min_factor": scale}
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, _COLOUR_SPACE[channels], buffer=buffer, **reduced)
    except ValueError as error:
        if any(word in str(error).lower() for word in _DAMAGE_WARNINGS):
            raise BadImageError(str(error)) from None
        return None
    return pixels


def _orientation(data: bytes) -> int:
    """Return the orientation that Pillow would find: that of EXIF, else of XMP, else 1.

    Raises:
        _OddError: if the metadata are unusual.
    """
    exif, xmp = b"", b""
    position = 2
    while data[position + 1] != _START_OF_SCAN:
        if data[position] != 0xFF or not 0xC0 <= data[position + 1] <= 0xFE:
            raise _OddError
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if data[position + 1] == _APP1:
            segment = data[position + 4 : end]
            if segment.startswith(_XMP):
                xmp = segment
            elif segment.startswith(_EXIF):
                if exif:
                    raise _OddError
                exif = segment[len(_EXIF) :]
        position = end
    orientation = _exif_orientation(exif) if exif else None
    if orientation is None and (found := _XMP_ORIENTATION.search(xmp)):
        orientation = int(found[1])
    return orientation if orientation and orientation <= 8 else 1


def _exif_orientation(tiff: bytes) -> int | None:
    """Return the orientation in the first directory of an EXIF block, or None.

    Raises:
        _OddError: if the block is unusual.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise _OddError
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    entries = struct.iter_unpack(f"{order}HHIHH", tiff[start + 2 : start + 2 + 12 * count])
    found = {entry[1:4] for entry in entries if entry[0] == _ORIENTATION_TAG}
    if len(tiff) < start + 2 + 12 * count or len(found) > 1:
        raise _OddError
    for kind, length, value in found:
        if (kind, length) != (_SHORT, 1):
            raise _OddError
        return int(value)
    return None
