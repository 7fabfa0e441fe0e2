"""Masks of one picture: drawn at random by a kind and a share, or painted by hand."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mae import keyed
from mae.errors import UserError
from mae.keyed import Purpose
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.masking import MaskKind, kept_patches, make_mask

MaskChoice = Literal["random", "grid", "block", "green", "painted"]
"""Kind of a mask: one of `mae.models.masking.MaskKind`, or painted by hand."""


def drawn_mask(network: MaskedAutoencoder, kind: MaskKind, ratio: float, seed: int) -> Bool[Tensor, "rows columns"]:
    """Return a random mask of one picture, True for each hidden patch; the same for the same seed.

    It hides what `mae.inference.model.Model.reconstruct` hides of its first image, if the model was trained with this
    kind. A grid mask has only some shares, of which the nearest is taken.

    Raises:
        UserError: if the mask would hide no patch or all, or there is no grid mask for these patches.
    """
    ratio = _nearest_of_grid(network.grid, ratio) if kind == "grid" else ratio
    kept = kept_patches(network.grid, kind, ratio) if 0 < ratio < 1 else 0
    if not 0 < kept < network.patches:
        raise UserError(f"{ratio:.0%} hidden would hide none or all of {network.patches} patches; choose another share")
    noise = keyed.uniform_float32(keyed.key(Purpose.PICTURE, seed), np.arange(1), network.patches)
    mask = make_mask(torch.from_numpy(noise), network.grid, kind, kept, network.mask_version)
    return mask.hidden().reshape(network.grid)


def _nearest_of_grid(grid: tuple[int, int], ratio: float) -> float:
    cells = [cell for cell in range(2, min(grid) + 1) if grid[0] % cell == 0 and grid[1] % cell == 0]
    if not cells:
        raise UserError(f"no square cells divide {grid[0]}x{grid[1]} patches, so there is no grid mask; choose another")
    return min((1 - 1 / cell**2 for cell in cells), key=lambda share: abs(share - ratio))


def painted_mask(marks: str, grid: tuple[int, int]) -> Bool[Tensor, "rows columns"]:
    """Return the mask that is painted by hand.

    Args:
        marks: A `1` for each hidden patch and a `0` for each other, row by row; empty before anything is painted.
        grid: Rows and columns of patches.

    Raises:
        UserError: if it would hide no patch or all.
    """
    rows, columns = grid
    if "1" not in marks:
        raise UserError("nothing is painted yet: paint over the patches that the model shall not see")
    if len(marks) != rows * columns or set(marks) - {"0", "1"}:
        raise UserError(f"the painted mask does not fit {rows}x{columns} patches; paint it again")
    if "0" not in marks:
        raise UserError("every patch is painted over; leave some that the model can see")
    return torch.tensor([mark == "1" for mark in marks]).reshape(grid)
