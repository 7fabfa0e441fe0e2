"""What model to build: one size table and the settings of encoder and decoder."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mae.models.masking import MaskKind, grid_cell, kept_patches
from mae.models.patches import grid_size
from mae.settings import check


class Size(NamedTuple):
    """An encoder's width, number of blocks and attention heads."""

    width: int
    depth: int
    heads: int


SIZES = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}


# Widest encoder -> its decoder.
_DECODERS = {192: Size(192, 4, 6), 384: Size(256, 8, 8), 768: Size(512, 8, 16)}
_LARGEST_PRESET = max(_DECODERS)

# So that 0.8889 may be written for 8/9.
_RATIO_TOLERANCE = 1e-3


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder, a timm `VisionTransformer` with a cls token."""

    size: Literal["tiny", "small", "base", "large", "huge"] = "base"
    """Width/blocks/heads: tiny 192/12/3, small 384/12/6, base 768/12/12, large 1024/24/16, huge 1280/32/16."""
    width: int | None = None
    """Channels of a token, in place of the size's."""
    depth: int | None = None
    """Number of blocks, in place of the size's."""
    heads: int | None = None
    """Attention heads per block, in place of the size's."""
    patch_size: tuple[int, ...] = (16,)
    """Height and width [pixels] of a patch; one number for a square. Must divide data.image_size."""

    def __post_init__(self) -> None:
        width, depth, heads = self.shape
        check(width >= 4 and width % 4 == 0, "model.width", width, "a multiple of 4 (2-D sine-cosine positions)")
        check(depth >= 1, "model.depth", depth, "1 or more")
        check(heads >= 1 and width % heads == 0, "model.heads", heads, f"a divisor of the width {width}")
        check(
            len(self.patch_size) in (1, 2) and min(self.patch_size) >= 1,
            "model.patch_size",
            self.patch_size,
            "one number, or height and width, each at least 1 pixel",
        )

    @property
    def shape(self) -> Size:
        """The size with the overrides put in."""
        size = SIZES[self.size]
        return Size(
            size.width if self.width is None else self.width,
            size.depth if self.depth is None else self.depth,
            size.heads if self.heads is None else self.heads,
        )

    @property
    def patch(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self.patch_size[0], self.patch_size[-1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of (height, width).

        Raises:
            UserError: if the patch size does not divide the image size.
        """
        (height, width), (down, across) = image_size, self.patch
        check(
            height % down == 0 and width % across == 0,
            "model.patch_size",
            self.patch_size,
            f"divisors of the image size {height}x{width} (data.image_size)",
        )
        return grid_size(image_size, self.patch)


@dataclass(frozen=True)
class MaskedAutoencoderSettings(EncoderSettings):
    """The encoder, the light decoder and the task between them."""

    mask: MaskKind = "random"
    """Which patches are hidden: each by chance; all but one of each square cell (grid); rectangles (block)."""
    mask_ratio: float = 0.75
    """Share of the patches hidden from the encoder."""
    decoder: Literal["self", "cross"] = "self"
    """self: mask tokens and visible tokens attend to each other; cross: mask tokens to visible ones only (CrossMAE)."""
    decoder_width: int | None = None
    """Channels of a token in the decoder; None: 192, 256 or 512 for an encoder like tiny, small or larger."""
    decoder_depth: int | None = None
    """Blocks of the decoder; None: 4 for an encoder like tiny, else 8; half as many again if it is cross."""
    decoder_heads: int | None = None
    """Attention heads per block of the decoder; None: 6, 8 or 16 for an encoder like tiny, small or larger."""
    predict_ratio: float = 1.0
    """Share of the hidden patches that are predicted, chosen by chance; less is faster, above all with cross."""
    norm_pix_loss: bool = True
    """Predict each patch's pixels normalised by the patch's own mean and variance (the better target)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width, depth, heads = self.decoder_shape
        check(0 < self.mask_ratio < 1, "model.mask_ratio", self.mask_ratio, "above 0 and below 1")
        check(0 < self.predict_ratio <= 1, "model.predict_ratio", self.predict_ratio, "above 0, at most 1")
        check(width >= 4 and width % 4 == 0, "model.decoder_width", width, "a multiple of 4")
        check(depth >= 1, "model.decoder_depth", depth, "1 or more")
        check(heads >= 1 and width % heads == 0, "model.decoder_heads", heads, f"a divisor of {width}")

    @property
    def decoder_shape(self) -> Size:
        """Width, blocks and heads of the decoder: as set, else such that it costs about as much as the encoder.

        So does the published decoder, 512/8/16, beside ViT-B; with larger encoders it stays as it is.
        """
        like = min(self.shape.width, _LARGEST_PRESET)
        width, depth, heads = next(decoder for widest, decoder in _DECODERS.items() if like <= widest)
        if self.decoder == "cross":
            depth = depth * 3 // 2
        return Size(
            width if self.decoder_width is None else self.decoder_width,
            depth if self.decoder_depth is None else self.decoder_depth,
            heads if self.decoder_heads is None else self.decoder_heads,
        )

    def kept(self, grid: tuple[int, int]) -> int:
        """Patches that the encoder sees, of a grid of (rows, columns)."""
        return kept_patches(grid, self.mask, self.mask_ratio)

    def predicted(self, grid: tuple[int, int]) -> int:
        """Patches that the decoder predicts: at least one."""
        hidden = grid[0] * grid[1] - self.kept(grid)
        return max(1, round(hidden * self.predict_ratio))

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Refuse an image size that the patches do not divide, or of which the mask keeps or hides none."""
        rows, columns = grid = self.grid(image_size)
        if self.mask == "grid":
            cell = grid_cell(self.mask_ratio)
            exact = abs(1 - 1 / cell**2 - self.mask_ratio) < _RATIO_TOLERANCE
            check(
                cell > 1 and exact and rows % cell == 0 and columns % cell == 0,
                "model.mask_ratio",
                self.mask_ratio,
                f"with a grid mask of {rows}x{columns} patches 1 - 1/n^2, where n divides both: "
                f"{', '.join(f'{1 - 1 / n**2:.4g}' for n in _common_divisors(rows, columns)) or 'none'}",
            )
        check(
            0 < self.kept(grid) < rows * columns,
            "model.mask_ratio",
            self.mask_ratio,
            f"a share that keeps at least 1 and hides at least 1 of the {rows * columns} patches",
        )


def _common_divisors(rows: int, columns: int) -> list[int]:
    """From 2 on."""
    return [n for n in range(2, min(rows, columns) + 1) if rows % n == 0 and columns % n == 0]
