"""What model to build: one size table and the settings of encoder and decoder."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mae.models.masking import kept_patches
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

    mask_ratio: float = 0.75
    """Share of the patches hidden from the encoder."""
    decoder_width: int = 512
    """Channels of a token in the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads per block of the decoder."""
    norm_pix_loss: bool = True
    """Predict each patch's pixels normalised by the patch's own mean and variance (the better target)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width, heads = self.decoder_width, self.decoder_heads
        check(0 < self.mask_ratio < 1, "model.mask_ratio", self.mask_ratio, "above 0 and below 1")
        check(width >= 4 and width % 4 == 0, "model.decoder_width", width, "a multiple of 4")
        check(self.decoder_depth >= 1, "model.decoder_depth", self.decoder_depth, "1 or more")
        check(heads >= 1 and width % heads == 0, "model.decoder_heads", heads, f"a divisor of {width}")

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Refuse an image size that the patches do not divide or of which none would be kept or hidden."""
        rows, columns = self.grid(image_size)
        kept = kept_patches(rows * columns, self.mask_ratio)
        check(
            0 < kept < rows * columns,
            "model.mask_ratio",
            self.mask_ratio,
            f"a share that keeps at least 1 and hides at least 1 of the {rows * columns} patches",
        )
