"""Optional decoding of only a region of a JPEG, on machines that have TurboJPEG 3.

Decoding only the region of a crop is about a sixth faster than decoding the whole image, and gives the same pixels.
No Python package contains this part of libjpeg-turbo, so the system's library is used.
`MAE_TURBOJPEG=/path/to/libturbojpeg.so` selects another one, and an empty `MAE_TURBOJPEG` turns it off.
"""

import ctypes
import ctypes.util
import os
import threading
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mae.errors import UserError

# Constants of turbojpeg.h.
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT = 4, 5, 6  # TJPARAM_SUBSAMP, _JPEGWIDTH, _JPEGHEIGHT
_PIXEL_FORMAT = {1: 6, 3: 0, 4: 7}  # channels -> TJPF_GRAY, TJPF_RGB, TJPF_RGBA
# Width in pixels of the blocks that are decoded together, for TJSAMP_444, 422, 420, GRAY, 440, 411, 441.
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("width", ctypes.c_int), ("height", ctypes.c_int))


class _Scale(ctypes.Structure):
    _fields_ = (("numerator", ctypes.c_int), ("denominator", ctypes.c_int))


_HANDLE, _INT, _SIZE, _BYTES = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
_SIGNATURES = {
    "tj3Init": (_HANDLE, (_INT,)),
    "tj3Destroy": (None, (_HANDLE,)),
    "tj3Get": (_INT, (_HANDLE, _INT)),
    "tj3DecompressHeader": (_INT, (_HANDLE, _BYTES, _SIZE)),
    "tj3SetScalingFactor": (_INT, (_HANDLE, _Scale)),
    "tj3SetCroppingRegion": (_INT, (_HANDLE, _Region)),
    "tj3Decompress8": (_INT, (_HANDLE, _BYTES, _SIZE, ctypes.c_void_p, _INT, _INT)),
}


class TurboJpeg:
    """TurboJPEG library; each thread has its own decoder and releases Python's global lock while it decodes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library, self._of_this_thread = library, threading.local()

    def decode_region(
        self, data: bytes, top: int, left: int, height: int, width: int, channels: int, scale: int = 1
    ) -> NDArray[np.uint8] | None:
        """Decode a region of the image reduced `scale` (1, 2, 4, 8) times: pixels [height width channels].

        The region is given in pixels of the reduced image; its pixels equal those of the whole image bit by bit.
        Return None if the library reports any problem; it does not read the file below the region.
        """
        library, handle = self._library, self._handle()
        if library.tj3DecompressHeader(handle, data, len(data)) or library.tj3SetScalingFactor(
            handle, _Scale(1, scale)
        ):
            return None
        subsampling = library.tj3Get(handle, _SUBSAMPLING)
        if not 0 <= subsampling < len(_BLOCK_WIDTHS):
            return None
        whole_width = -(-library.tj3Get(handle, _WIDTH) // scale)
        whole_height = -(-library.tj3Get(handle, _HEIGHT) // scale)
        # The library starts at whole blocks and interpolates chroma between neighbours. One more block on each side
        # is needed for the border columns to equal those of the whole image.
        block = max(1, _BLOCK_WIDTHS[subsampling] // scale)
        start = max(0, left // block - 1) * block
        stop = min(whole_width, left + width + block)
        region = _Region(start, top, stop - start, height)
        if (stop - start, height) == (whole_width, whole_height):
            region = _Region()  # the whole image
        if library.tj3SetCroppingRegion(handle, region):
            return None
        pixels = np.empty((height, stop - start, channels), dtype=np.uint8)
        if library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _PIXEL_FORMAT[channels]):
            return None
        return pixels[:, left - start : left - start + width]

    def _handle(self) -> int:
        if not hasattr(self._of_this_thread, "handle"):
            self._of_this_thread.handle = _Handle(self._library)
        handle: _Handle = self._of_this_thread.handle
        return handle.address


class _Handle:
    """TurboJPEG decompressor, freed when its thread ends."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._destroy = library.tj3Destroy
        self.address: int = library.tj3Init(_DECOMPRESS)
        if not self.address:
            raise MemoryError("TurboJPEG cannot create a decompressor")

    def __del__(self) -> None:
        self._destroy(self.address)


@cache
def find() -> TurboJpeg | None:
    """Return the library, or None if the machine has none of version 3 or newer.

    Raises:
        UserError: if `MAE_TURBOJPEG` names a file that is not such a library.
    """
    named = os.environ.get("MAE_TURBOJPEG")
    path = ctypes.util.find_library("turbojpeg") if named is None else named
    if not path:
        return None
    try:
        return TurboJpeg(ctypes.CDLL(path))
    except (OSError, AttributeError) as error:  # not a library, or version 2, which lacks these functions
        if named is None:
            return None
        raise UserError(
            f"MAE_TURBOJPEG={named} is not a TurboJPEG library of version 3 or newer ({error}); unset it or change it"
        ) from None
