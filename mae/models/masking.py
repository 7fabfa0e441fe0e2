"""Masks, made from uniform noise on the device; of every image the same number of patches is kept.

Each kind turns the noise into a score per patch, and the patches with the smallest scores are kept.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mae.errors import UserError

MaskKind = Literal["random", "grid", "block"]

# Rectangles as in BEiT (arXiv 2106.08254): of this aspect, and of these shares of the image.
_BLOCK_ASPECT = 0.3
_BLOCK_AREA = (1 / 12, 1 / 4)
_NUMBERS_PER_BLOCK = 4


class Mask(NamedTuple):
    """Which patches the encoder sees; every image keeps the same number."""

    ids_keep: Int64[Tensor, "batch kept"]
    """Kept patches, in random order."""
    ids_hidden: Int64[Tensor, "batch hidden"]
    """All others, in random order: the first of them are a random share."""

    def hidden(self) -> Bool[Tensor, "batch patches"]:
        """True where a patch is hidden."""
        patches = self.ids_keep.shape[1] + self.ids_hidden.shape[1]
        everywhere = torch.ones(len(self.ids_keep), patches, dtype=torch.bool, device=self.ids_keep.device)
        return everywhere.scatter_(1, self.ids_keep, False)


def kept_patches(grid: tuple[int, int], kind: MaskKind, mask_ratio: float) -> int:
    """How many patches of a grid of (rows, columns) stay visible; the published rule rounds down."""
    patches = grid[0] * grid[1]
    return patches // grid_cell(mask_ratio) ** 2 if kind == "grid" else int(patches * (1 - mask_ratio))


def grid_cell(mask_ratio: float) -> int:
    """Side of the square cells, in patches, of which a grid mask keeps one patch each: 2 for a ratio of 3/4."""
    return round(1 / math.sqrt(1 - mask_ratio))


def make_mask(noise: Float[Tensor, "batch patches"], grid: tuple[int, int], kind: MaskKind, kept: int) -> Mask:
    """The mask of a kind; equal scores keep the earlier patch on every device.

    `random` (arXiv 2111.06377) keeps the patches with the smallest noise. `grid` keeps one patch of each square cell,
    at a place that is drawn for the image. `block` hides rectangles, the last one as far as it is needed.
    """
    scores = noise
    if kind == "grid":
        scores = _grid_scores(noise, grid, math.isqrt(noise.shape[1] // kept))
    elif kind == "block":
        scores = _block_scores(noise, grid, kept)
    return _keep_least(scores, kept)


def mask_of(hidden: Bool[Tensor, "batch patches"], noise: Float[Tensor, "batch patches"]) -> Mask:
    """One's own mask: True where a patch is hidden; of each image as many. The noise puts them in random order.

    Raises:
        UserError: if images hide different numbers of patches, or none, or all.
    """
    numbers = sorted(set(hidden.sum(dim=1).tolist()))
    if len(numbers) != 1 or not 0 < numbers[0] < hidden.shape[1]:
        raise UserError(
            f"a mask hides {' or '.join(map(str, numbers))} of {hidden.shape[1]} patches; "
            "allowed: the same number for each image, at least 1 and not all"
        )
    return _keep_least(noise + hidden, hidden.shape[1] - numbers[0])


def _keep_least(scores: Float[Tensor, "batch patches"], kept: int) -> Mask:
    order = scores.argsort(dim=1, stable=True)
    return Mask(order[:, :kept], order[:, kept:])


def _grid_scores(
    noise: Float[Tensor, "batch patches"], grid: tuple[int, int], cell: int
) -> Float[Tensor, "batch patches"]:
    """Below 1 for the kept patch of each cell of `cell` x `cell`, from 1 for all others."""
    place = _place_in_cell(grid, cell, noise.device)
    chosen = (noise[:, :1] * cell**2).long()
    return _lower_bits(noise) + (place != chosen)


def _place_in_cell(grid: tuple[int, int], cell: int, device: torch.device) -> Int64[Tensor, "1 patches"]:
    row = torch.arange(grid[0], device=device)[:, None] % cell
    column = torch.arange(grid[1], device=device)[None, :] % cell
    return (row * cell + column).flatten()[None]


def _block_scores(
    noise: Float[Tensor, "batch patches"], grid: tuple[int, int], kept: int
) -> Float[Tensor, "batch patches"]:
    """From 1 for the patches that are covered by a rectangle first, below 1 for `kept` others."""
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
    # argmax finds the first block that covers a patch; a last one covers all.
    everywhere = torch.ones_like(covered[:, :1])
    first = torch.cat([covered, everywhere], dim=1).int().argmax(dim=1)
    by_chance = _lower_bits(noise)
    return by_chance + _keep_least(blocks - first + by_chance, kept).hidden()


def _lower_bits(noise: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch patches"]:
    """Uniform noise from 0 to 1 that knows nothing of the upper bits, where these have been used."""
    return (noise * 4096).frac()


def _is_covered(
    start: Float[Tensor, "batch blocks"], length: Float[Tensor, "batch blocks"], size: int
) -> Bool[Tensor, "batch blocks size"]:
    """Where an interval of a whole `length` lies on a line of `size` patches, for a start drawn from 0 to 1.

    It may stand out at either end, so that no patch is covered more often than another.
    """
    first = (start * (size + length - 1)).floor()[:, :, None] - length[:, :, None] + 1
    place = torch.arange(size, device=start.device)
    return (first <= place) & (place < first + length[:, :, None])
