"""Masks, made on the device from uniform noise. Every image of a batch keeps the same number of patches.

Each kind of mask turns the noise into a score per patch, and keeps the patches with the smallest scores.
"""

import math
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float, Int64, Real
from torch import Tensor

from mae.errors import UserError

MaskKind = Literal["random", "grid", "block", "green"]

# Least aspect of a rectangle, and least and greatest share of the image, as in BEiT (arXiv 2106.08254).
_BLOCK_ASPECT = 0.3
_BLOCK_AREA = (1 / 12, 1 / 4)
_NUMBERS_PER_BLOCK = 4

MASK_VERSIONS = (1, 2)
"""Versions of the rules: 2 orders the patches that a `block` mask hides by numbers independent of the blocks."""
# Noise has 24 random bits. The multipliers are odd, so that all steps of `_scrambled` can be undone.
_BITS = 24
_MULTIPLIERS = (0x2C1B3D, 0x297A4D)
_HIDDEN, _ORDER = 0x9E3779, 0x3C6EF3
# Passes of the blur of `green` masks: standard deviations of 0.7 and 1.4 patches.
_NARROW, _BROAD = 1, 4
_BLUR_SUM = 16


class Mask(NamedTuple):
    """Places of the patches that the encoder sees and of those it does not; the same number for every image."""

    ids_keep: Int64[Tensor, "batch kept"]
    """Places of kept patches, in random order."""
    ids_hidden: Int64[Tensor, "batch hidden"]
    """Places of all other patches, in random order: the first of them are a random share."""

    def hidden(self) -> Bool[Tensor, "batch patches"]:
        """Return True for each patch that is hidden."""
        patches = self.ids_keep.shape[1] + self.ids_hidden.shape[1]
        everywhere = torch.ones(len(self.ids_keep), patches, dtype=torch.bool, device=self.ids_keep.device)
        return everywhere.scatter_(1, self.ids_keep, False)


def kept_patches(grid: tuple[int, int], kind: MaskKind, mask_ratio: float) -> int:
    """Return how many patches of a grid of (rows, columns) stay visible; the published rule rounds down."""
    patches = grid[0] * grid[1]
    return patches // grid_cell(mask_ratio) ** 2 if kind == "grid" else int(patches * (1 - mask_ratio))


def grid_cell(mask_ratio: float) -> int:
    """Return the side [patches] of the square cells in which a grid mask keeps one patch: 2 for a ratio of 3/4."""
    return round(1 / math.sqrt(1 - mask_ratio))


def make_mask(
    noise: Float[Tensor, "batch patches"],
    grid: tuple[int, int],
    kind: MaskKind,
    kept: int,
    version: int = MASK_VERSIONS[-1],
) -> Mask:
    """Make a mask of this kind. Of equal scores the earlier patch is kept, on every device.

    `random` (arXiv 2111.06377) keeps the patches with the smallest noise. `grid` keeps one patch of each square cell,
    at a place that is drawn for each image. `block` hides rectangles, the last one only in part if need be. `green`
    keeps clusters of a few patches, spread evenly: the greatest values of noise without its lowest and highest
    frequencies (ColorMAE, arXiv 2407.13036). `version` is one of `MASK_VERSIONS`.
    """
    if kind == "random":
        scores = noise
    elif kind == "grid":
        scores = _grid_scores(noise, grid, math.isqrt(noise.shape[1] // kept))
    elif kind == "block":
        scores = _block_scores(noise, grid, kept, version)
    elif kind == "green":
        scores = _green_scores(noise, grid, kept)
    else:
        assert_never(kind)
    return _keep_least(scores, kept)


def mask_of(hidden: Bool[Tensor, "batch patches"], noise: Float[Tensor, "batch patches"]) -> Mask:
    """Turn a mask of your own, True where a patch is hidden, into a `Mask`, in the random order of the noise.

    Raises:
        UserError: if the images hide different numbers of patches, or none, or all.
    """
    numbers = sorted(set(hidden.sum(dim=1).tolist()))
    if len(numbers) != 1 or not 0 < numbers[0] < hidden.shape[1]:
        raise UserError(
            f"a mask hides {' or '.join(map(str, numbers))} of {hidden.shape[1]} patches; "
            "allowed: the same number for each image, at least 1 and not all"
        )
    return _keep_least(noise + hidden, hidden.shape[1] - numbers[0])


def _keep_least(scores: Real[Tensor, "batch patches"], kept: int) -> Mask:
    order = scores.argsort(dim=1, stable=True)
    return Mask(order[:, :kept], order[:, kept:])


def _grid_scores(
    noise: Float[Tensor, "batch patches"], grid: tuple[int, int], cell: int
) -> Float[Tensor, "batch patches"]:
    """Return scores below 1 for the kept patch of each cell of `cell` x `cell`, and 1 or more for all others."""
    place = _place_in_cell(grid, cell, noise.device)
    chosen = (noise[:, :1] * cell**2).long()
    return _lower_bits(noise) + (place != chosen)


def _place_in_cell(grid: tuple[int, int], cell: int, device: torch.device) -> Int64[Tensor, "1 patches"]:
    row = torch.arange(grid[0], device=device)[:, None] % cell
    column = torch.arange(grid[1], device=device)[None, :] % cell
    return (row * cell + column).flatten()[None]


def _block_scores(
    noise: Float[Tensor, "batch patches"], grid: tuple[int, int], kept: int, version: int
) -> Float[Tensor, "batch patches"]:
    """Return scores of 1 or more for patches that rectangles cover, below 1 for `kept` others."""
    rows, columns = grid
    blocks = max(1, noise.shape[1] // _NUMBERS_PER_BLOCK)
    numbers = noise[:, : blocks * _NUMBERS_PER_BLOCK]
    if numbers.shape[1] < _NUMBERS_PER_BLOCK:
        numbers = numbers.repeat(1, _NUMBERS_PER_BLOCK)[:, :_NUMBERS_PER_BLOCK]
    area, aspect, top, left = numbers.view(-1, blocks, _NUMBERS_PER_BLOCK).unbind(2)
    area = rows * columns * (_BLOCK_AREA[0] + (_BLOCK_AREA[1] - _BLOCK_AREA[0]) * area)
    aspect = torch.exp(math.log(_BLOCK_ASPECT) * (1 - 2 * aspect))
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    in_rows = _is_covered(top, height, rows)
    in_columns = _is_covered(left, width, columns)
    covered = (in_rows[:, :, :, None] & in_columns[:, :, None, :]).flatten(2)
    # argmax finds the first rectangle that covers a patch; a last one covers all patches.
    everywhere = torch.ones_like(covered[:, :1])
    first = torch.cat([covered, everywhere], dim=1).int().argmax(dim=1)
    # The last block is hidden in part. If the same numbers chose its patches and ordered them, they would come last.
    choice, order = [_lower_bits(noise)] * 2 if version == 1 else [_scrambled(noise, key) for key in (_HIDDEN, _ORDER)]
    return order + _keep_least(blocks - first + choice, kept).hidden()


def _green_scores(
    noise: Float[Tensor, "batch patches"], grid: tuple[int, int], kept: int
) -> Float[Tensor, "batch patches"]:
    """Return scores of 1 or more for hidden patches, below 1 for `kept` others, in random order among each other.

    The noise blurred little, less the noise blurred more, has neither its highest nor its lowest frequencies. Both
    filters go on at the opposite border, so that every patch is kept equally often; in integers, they are exact.
    """
    words = (noise * 2**_BITS).long().unflatten(1, grid)
    narrow = _blurred(words, _NARROW)
    broad = _blurred(words, _BROAD)
    strength = narrow * _BLUR_SUM ** (_BROAD - _NARROW) - broad
    return _scrambled(noise, _ORDER) + _keep_least(-strength.flatten(1), kept).hidden()


def _blurred(words: Int64[Tensor, "batch rows columns"], times: int) -> Int64[Tensor, "batch rows columns"]:
    """Return the sums of neighbours with the weights 1, 2, 1 in both directions, `times` times over."""
    for _ in range(times):
        for dimension in (1, 2):
            words = words.roll(1, dimension) + 2 * words + words.roll(-1, dimension)
    return words


def _lower_bits(noise: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch patches"]:
    """Return uniform noise from 0 to 1 that does not depend on the upper bits of `noise`, which are used already."""
    return (noise * 4096).frac()


def _scrambled(noise: Float[Tensor, "batch patches"], key: int) -> Float[Tensor, "batch patches"]:
    """Return uniform noise from 0 to 1 in which every bit depends on all bits of `noise` and of `key`.

    Integers are exact on every device. The steps are those of MurmurHash3's finalizer, for 24 bits.
    """
    words = (noise * 2**_BITS).long() ^ key
    for multiplier in _MULTIPLIERS:
        words = (words ^ (words >> _BITS // 2)) * multiplier % 2**_BITS
    scrambled: Tensor = (words ^ (words >> _BITS // 2)) / 2**_BITS
    return scrambled.to(noise.dtype)


def _is_covered(
    start: Float[Tensor, "batch blocks"], length: Float[Tensor, "batch blocks"], size: int
) -> Bool[Tensor, "batch blocks size"]:
    """Return which of `size` patches in a line an interval of a whole `length` covers, for a start from 0 to 1.

    The interval may reach past either end, so that every patch is covered equally often.
    """
    first = (start * (size + length - 1)).floor()[:, :, None] - length[:, :, None] + 1
    place = torch.arange(size, device=start.device)
    return (first <= place) & (place < first + length[:, :, None])
