"""JPEGs by libjpeg-turbo: the header, and the pixels of a region, whole or reduced.

All of it gives the pixels that Pillow gives, or leaves the file to Pillow.
"""

import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from mae.data.images import turbojpeg
from mae.errors import BadImageError

SCALES = (8, 4, 2, 1)
"""How many times libjpeg can reduce an image while it decodes it, at the price of a few decibels."""

_COLOUR_SPACE = {1: "GRAY", 3: "RGB", 4: "RGBA"}
# libjpeg's words for a damaged scan; Pillow, which does not listen to them, gives half-gray or shifted images.
_DAMAGE = ("premature end", "bad huffman code", "bad arithmetic code", "found marker")
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_END_OF_IMAGE = b"\xff\xd9"
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ORIENTATION_TAG, _SHORT = 274, 3
_TURNED = range(5, 9)


class _OddError(Exception):
    """The markers or the EXIF block want a parser that knows more."""


class Header(NamedTuple):
    """What a JPEG says of itself."""

    height: int
    width: int
    gray: bool
    """Whether it stores a single plane; otherwise it is RGB or YCbCr."""
    orientation: int
    """EXIF's orientation, 1 to 8: how the stored image has to be turned."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        return (self.width, self.height) if self.orientation in _TURNED else (self.height, self.width)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def read_header(data: bytes) -> Header | None:
    """The header of an 8-bit gray or colour JPEG; None for anything else or anything odd."""
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
    """Pixels [height width channels] of a region, in the coordinates of the upright image reduced `scale` times.

    Colour becomes gray by Pillow's luma (ITU-R 601-2) and gray becomes three equal planes. None where
    libjpeg-turbo objects to something that Pillow may know better.

    Raises:
        BadImageError: if the file is cut or its scan is damaged.
    """
    planes = 3 if channels == 1 and not header.gray else channels
    pixels = None
    library = turbojpeg.find()
    # That library stops below the region, and so would not see that the rest of a file is cut off.
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
    """The part of an image [height width channels] that lies in a box, as a view."""
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of a stored image [height width channels] as it stands upright."""
    if orientation in _TURNED:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]


def _decode(data: bytes, header: Header, channels: int, scale: int) -> NDArray[np.uint8] | None:
    """The whole stored image; libjpeg rounds the size of a reduced one up."""
    height, width = -(-header.height // scale), -(-header.width // scale)
    buffer = np.empty((height, width, channels), dtype=np.uint8)
    reduced = {} if scale == 1 else {"min_height": height, "min_width": width, "min_factor": scale}
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, _COLOUR_SPACE[channels], buffer=buffer, **reduced)
    except ValueError as error:
        if any(word in str(error).lower() for word in _DAMAGE):
            raise BadImageError(str(error)) from None
        return None
    return pixels


def _orientation(data: bytes) -> int:
    """The orientation that Pillow would find: EXIF's, else XMP's, else 1.

    Raises:
        _OddError: where it is not that simple.
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
    """The number in the first directory of an EXIF block; None without one.

    Raises:
        _OddError: if it is not that simple.
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
