"""Images to sequences of flattened patches and back, and selection of patches."""

from jaxtyping import Int64, Shaped
from torch import Tensor


def grid_size(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of patches in an image of (height, width), which the patch size must divide."""
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def patchify(
    images: Shaped[Tensor, "batch channels height width"], patch_size: tuple[int, int]
) -> Shaped[Tensor, "batch patches pixels"]:
    """Cut images into patches, row by row; the pixels of a patch are ordered (row, column, channel).

    This is the order of the published decoder weights. `pixels` is patch height * patch width * channels.
    """
    batch, channels, height, width = images.shape
    rows, columns = grid_size((height, width), patch_size)
    cells = images.reshape(batch, channels, rows, patch_size[0], columns, patch_size[1])
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(
    patches: Shaped[Tensor, "batch patches pixels"], grid: tuple[int, int], patch_size: tuple[int, int]
) -> Shaped[Tensor, "batch channels height width"]:
    """Invert `patchify` for a grid of (rows, columns)."""
    rows, columns = grid
    cells = patches.reshape(len(patches), rows, columns, patch_size[0], patch_size[1], -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch_size[0], columns * patch_size[1])


def take(
    sequence: Shaped[Tensor, "batch tokens width"], ids: Int64[Tensor, "batch taken"]
) -> Shaped[Tensor, "batch taken width"]:
    """Return the tokens of each sequence at its own `ids`."""
    return sequence.gather(1, ids[:, :, None].expand(-1, -1, sequence.shape[2]))
