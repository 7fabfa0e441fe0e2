"""Decoding, cropping and resizing of JPEGs on the device, for machines with too few CPU cores to keep it busy.

A worker then only reads the bytes and draws the crop boxes. A GPU decodes with nvJPEG and resizes in floating point,
so its pixels differ by about one level from those of the CPU, which are the reference. nvJPEG is also less strict
about damaged files, so run `mae index --check` first.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mae.data.images.augment import FLIP, AugmentSettings, crop_box
from mae.data.images.decode import jpeg_header
from mae.errors import UserError

_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_UPRIGHT = 1


class Encoded(NamedTuple):
    """JPEGs of a micro-batch, one after another, and the views to make from each."""

    files: UInt8[Tensor, " bytes"]
    sizes: list[int]
    """Size of each JPEG in bytes."""
    rows: Int64[Tensor, " views"]
    """Row of the batch for each view; each file has the same number of views."""
    boxes: Int64[Tensor, "views 4"]
    """Top, left, height, width [pixels]."""
    flips: Bool[Tensor, " views"]


class EncodedImages:
    """Collection of the images that the device will decode."""

    def __init__(self, channels: int, augmentation: AugmentSettings) -> None:
        self._channels, self._augmentation = channels, augmentation
        self._files = list[bytes]()
        self._rows, self._boxes, self._flips = list[int](), list[Sequence[int]](), list[bool]()

    def add(self, data: bytes, rows: Sequence[int], numbers: NDArray[np.float64]) -> bool:
        """Add an upright JPEG; `numbers`, [views, `NUMBERS_PER_SAMPLE`], give the crops and flips of these rows.

        Return False for any other image, which the CPU must decode.

        Raises:
            BadImageError: for too many pixels.
        """
        header = jpeg_header(data, self._channels)
        if header is None or header.orientation != _UPRIGHT:
            return False
        for row, of_view in zip(rows, numbers.tolist(), strict=True):
            self._rows.append(row)
            self._boxes.append(crop_box(header.height, header.width, of_view, self._augmentation))
            self._flips.append(self._augmentation.flip and of_view[FLIP] < 0.5)
        self._files.append(data)
        return True

    def collected(self) -> Encoded:
        """Return all images as a few tensors, because each tensor takes time to leave a worker."""
        return Encoded(
            files=torch.frombuffer(bytearray(b"".join(self._files)), dtype=torch.uint8)
            if self._files
            else torch.zeros(0, dtype=torch.uint8),
            sizes=[len(data) for data in self._files],
            rows=torch.tensor(self._rows, dtype=torch.int64),
            boxes=torch.tensor(self._boxes, dtype=torch.int64).view(-1, 4),
            flips=torch.tensor(self._flips, dtype=torch.bool),
        )


def decode_into(
    images: UInt8[Tensor, "batch channels height width"], encoded: Encoded, ids: Int64[Tensor, " batch"]
) -> None:
    """Decode on the device of `images` and fill the rows of the views; messages name samples by `ids`.

    Raises:
        UserError: if the device cannot decode some samples; it names them.
    """
    if not encoded.sizes:
        return
    files = list(torch.split(encoded.files, encoded.sizes))
    mode = _MODES[images.shape[1]]
    try:
        decoded = _decoded(files, mode, images.device)
    except RuntimeError:
        raise UserError(_undecodable(files, mode, images.device, encoded, ids)) from None
    views = len(encoded.rows) // len(files)
    size = (images.shape[2], images.shape[3])
    plan = zip(encoded.rows.tolist(), encoded.boxes.tolist(), encoded.flips.tolist(), strict=True)
    for number, (row, (top, left, height, width), flip) in enumerate(plan):
        crop = decoded[number // views][None, :, top : top + height, left : left + width]
        view = F.interpolate(crop.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)[0]
        images[row] = (view.flip(-1) if flip else view).to(torch.uint8)


def _decoded(files: list[Tensor], mode: ImageReadMode, device: torch.device) -> list[Tensor]:
    # torchvision 0.29 and later warn that torchcodec will replace it; torchcodec is not among the pinned packages.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        found: list[Tensor] = decode_jpeg(files, mode=mode, device=device)
    return found


def _undecodable(
    files: Sequence[Tensor], mode: ImageReadMode, device: torch.device, encoded: Encoded, ids: Tensor
) -> str:
    """Return a message that names the files that the device cannot decode; try them one by one."""
    wrong = []
    for number, file in enumerate(files):
        try:
            _decoded([file], mode, device)
        except RuntimeError as error:
            sample = int(ids[encoded.rows[number * len(encoded.rows) // len(files)]])
            wrong.append(f"number {sample} ({str(error).splitlines()[0]})")
    return (
        f"the device cannot decode {len(wrong)} samples of a batch, {'; '.join(wrong[:5])}; "
        "set data.decode_on to cpu, or find damaged images with mae index --check"
    )
