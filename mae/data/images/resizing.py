"""Resizing of cropped pixels, bicubic with antialiasing, in uint8: one by one, or many small ones together."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def resized(pixels: NDArray[np.uint8], size: tuple[int, int], flip: bool = False) -> Tensor:
    """Resize pixels [height width channels] and mirror them if `flip`: uint8 [out_height out_width channels]."""
    # torch's kernel is several times faster if the channels of a pixel are adjacent in memory.
    planes = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size, mode="bicubic", antialias=True)
    return (planes.flip(-1) if flip else planes)[0].permute(1, 2, 0)


def resized_together(
    crops: list[NDArray[np.uint8]], flips: NDArray[np.bool_], size: tuple[int, int]
) -> list[NDArray[np.uint8]]:
    """Return `resized` of each crop, computed with fewer calls.

    For a small crop, torch's kernel spends most of its time on two tables of weights. It first resizes the rows of
    pixels, rounds, and then resizes the columns. So crops of one width can share the first step, and crops of one
    height the second.
    """
    height, width = size
    halfway, views = list(crops), list(crops)
    mirrored_first = np.argsort(~flips, kind="stable").tolist()
    for members in _groups(mirrored_first, [crop.shape[1] for crop in crops]):
        joined = np.concatenate([crops[n] for n in members])
        rows = resized(joined, (len(joined), width))
        mirrored = rows[: sum(len(crops[n]) for n in members if flips[n])].flip(1).numpy()
        plain, start = rows.numpy(), 0
        for n in members:
            end = start + len(crops[n])
            halfway[n], start = (mirrored if flips[n] else plain)[start:end], end
    for members in _groups(range(len(crops)), [len(crop) for crop in crops]):
        joined = np.concatenate([halfway[n] for n in members], axis=1)
        columns = resized(joined, (height, joined.shape[1])).numpy()
        for place, n in enumerate(members):
            views[n] = columns[:, place * width : (place + 1) * width]
    return views


def _groups(numbers: Iterable[int], sizes: Sequence[int]) -> Iterable[list[int]]:
    """Group the numbers by size, in their order."""
    found: dict[int, list[int]] = {}
    for number in numbers:
        found.setdefault(sizes[number], []).append(number)
    return found.values()
