"""Settings of encoder and decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mae.models.masking import MASK_VERSIONS, MaskKind, grid_cell, kept_patches
from mae.models.patches import grid_size
from mae.models.sizes import SIZES, TEMPERATURE, Size
from mae.schema import Before
from mae.settings import check

_DEFAULT_PATCH = (16, 16)
# A position has sines and cosines of the row and of the column.
_WIDTH_STEP = 4

# Allows 0.8889 for 8/9.
_RATIO_TOLERANCE = 1e-3


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder, a timm `VisionTransformer` with a cls token."""

    size: str = "base"
    """Width/blocks/heads: tiny 192/12/3, small 384/12/6, base 768/12/12, large 1024/24/16, huge 1280/32/16; or the name
    of a plain ViT of timm, such as vit_base_patch8_224, for its shape and patch size."""
    width: int | None = None
    """Channels of a token; None: as `size` has it."""
    depth: int | None = None
    """Number of blocks; None: as `size` has it."""
    heads: int | None = None
    """Attention heads per block; None: as `size` has it."""
    patch_size: tuple[int, ...] | None = None
    """Height and width [pixels] of a patch; one number for a square. Must divide data.image_size. None: as the timm
    model has it that `size` names, else 16."""
    position_temperature: float = TEMPERATURE
    """Temperature of the fixed sine-cosine positions of encoder and decoder: their wavelengths go from 2 pi patches to
    nearly 2 pi * temperature patches. On a grid of few patches, a low one tells the places apart better."""

    def __post_init__(self) -> None:
        _check_size(self.shape, "model.")
        given = self.patch_size
        check(
            given is None or (len(given) in (1, 2) and min(given) >= 1),
            "model.patch_size",
            given,
            "one number, or height and width, each at least 1 pixel",
        )
        temperature = self.position_temperature
        check(1 < temperature < math.inf, "model.position_temperature", temperature, "a finite number above 1")

    @property
    def shape(self) -> Size:
        """Width, blocks and heads: as set, else as `size` has them."""
        size, _ = _stands_for(self.size)
        return Size(
            size.width if self.width is None else self.width,
            size.depth if self.depth is None else self.depth,
            size.heads if self.heads is None else self.heads,
        )

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width [pixels] of a patch."""
        if self.patch_size is None:
            return _stands_for(self.size)[1]
        return self.patch_size[0], self.patch_size[-1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of patches in an image of (height, width).

        Raises:
            UserError: if the patch size does not divide the image size.
        """
        (height, width), (down, across) = image_size, self.patch
        check(
            height % down == 0 and width % across == 0,
            "model.patch_size",
            f"{down}x{across}",
            f"divisors of the image size {height}x{width} (data.image_size): nearest {_divisors_around(down, height)} "
            f"high, {_divisors_around(across, width)} wide; or set data.image_size to "
            f"{_multiples_around(height, down)} high, {_multiples_around(width, across)} wide",
        )
        return grid_size(image_size, self.patch)


@dataclass(frozen=True)
class MaskedAutoencoderSettings(EncoderSettings):
    """Encoder, decoder and pretraining task."""

    mask: MaskKind = "random"
    """Which patches are hidden: any (random); all except one in each square cell (grid); rectangles (block); all
    except clusters of a few, spread evenly (green)."""
    mask_ratio: float = 0.75
    """Share of the patches hidden from the encoder."""
    mask_version: Annotated[int, Before(1)] = MASK_VERSIONS[-1]
    """Version of the rules of masks. Runs from before version 2 keep 1, in which, with mask block and predict_ratio
    below 1, some patches are predicted up to 4 % more often than others."""
    decoder: str = "self"
    """self: mask tokens and visible tokens attend to each other; cross: mask tokens to visible ones only (CrossMAE)."""
    decoder_width: int | None = None
    """Channels of a token in the decoder; None: 192, 256 or 512 for an encoder like tiny, small or larger."""
    decoder_depth: int | None = None
    """Blocks of the decoder; None: 4 for an encoder like tiny, else 8; with cross 6 or 12."""
    decoder_heads: int | None = None
    """Attention heads per block of the decoder; None: 6, 8 or 16 for an encoder like tiny, small or larger."""
    predict_ratio: float = 1.0
    """Share of the hidden patches that are predicted, chosen at random; less is faster, most of all with cross."""
    norm_pix_loss: bool = True
    """Predict each patch's pixels normalised by the patch's own mean and variance (the better target)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.decoder in _decoders(), "model.decoder", self.decoder, ", ".join(_decoders()))
        _check_size(self.decoder_shape, "model.decoder_")
        versions = ", ".join(map(str, MASK_VERSIONS))
        check(self.mask_version in MASK_VERSIONS, "model.mask_version", self.mask_version, versions)
        check(0 < self.mask_ratio < 1, "model.mask_ratio", self.mask_ratio, "above 0 and below 1")
        check(0 < self.predict_ratio <= 1, "model.predict_ratio", self.predict_ratio, "above 0, at most 1")

    @property
    def decoder_shape(self) -> Size:
        """Width, blocks and heads of the decoder: as set, else as the decoder has them beside such an encoder."""
        width, depth, heads = _decoders()[self.decoder].default_shape(self.shape)
        return Size(
            width if self.decoder_width is None else self.decoder_width,
            depth if self.decoder_depth is None else self.decoder_depth,
            heads if self.decoder_heads is None else self.decoder_heads,
        )

    def kept(self, grid: tuple[int, int]) -> int:
        """Return the number of patches that the encoder sees in a grid of (rows, columns)."""
        return kept_patches(grid, self.mask, self.mask_ratio)

    def predicted(self, grid: tuple[int, int]) -> int:
        """Return the number of patches that the decoder predicts in a grid of (rows, columns): at least one."""
        hidden = grid[0] * grid[1] - self.kept(grid)
        return max(1, round(hidden * self.predict_ratio))

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Raise a `UserError` if patches do not divide an image of this size, or the mask keeps or hides no patch."""
        rows, columns = grid = self.grid(image_size)
        check(
            rows * columns > 1,
            "model.patch_size",
            f"{self.patch[0]}x{self.patch[1]}",
            "less than the image in height or width, because from a single patch nothing can be predicted",
        )
        if self.mask == "grid":
            cell = grid_cell(self.mask_ratio)
            exact = abs(1 - 1 / cell**2 - self.mask_ratio) < _RATIO_TOLERANCE
            check(
                cell > 1 and exact and rows % cell == 0 and columns % cell == 0,
                "model.mask_ratio",
                self.mask_ratio,
                f"with a grid mask of {rows}x{columns} patches 1 - 1/n^2, where n divides both: "
                f"{', '.join(f'{1 - 1 / n**2:.4g}' for n in _common_divisors(rows, columns)) or 'none does'}",
            )
        least, most = _ratio_range(rows * columns)
        check(
            0 < self.kept(grid) < rows * columns,
            "model.mask_ratio",
            self.mask_ratio,
            f"from {least} to {most}, which keeps at least 1 and hides at least 1 of the {rows * columns} patches",
        )


def _ratio_range(patches: int) -> tuple[float, float]:
    """Return short mask ratios, the least of which hides one patch of so many, and the greatest of which keeps one."""
    digits = 10 ** (len(str(patches)) + 1)
    # The published rule rounds down: with the floating-point number for 9/10 it may keep nothing, so one less is tried.
    largest = math.floor((1 - 1 / patches) * digits)
    return 1 / digits, next(n / digits for n in (largest, largest - 1) if int(patches * (1 - n / digits)))


def _stands_for(size: str) -> tuple[Size, tuple[int, int]]:
    """Return shape and default patch of a size in `SIZES` or of a timm model."""
    if size in SIZES:
        return SIZES[size], _DEFAULT_PATCH
    # timm takes seconds to import.
    from mae.models.timm_models import timm_shape  # noqa: PLC0415

    return timm_shape(size)


def _decoders() -> Mapping[str, Any]:
    """Return the decoders by name."""
    # They import timm, which takes seconds.
    from mae.models.decoders import DECODERS  # noqa: PLC0415

    return DECODERS


def _check_size(size: Size, prefix: str) -> None:
    """Raise a `UserError` for a size that no transformer can have, naming the setting, which begins with `prefix`."""
    width, depth, heads = size
    check(
        width >= _WIDTH_STEP and width % _WIDTH_STEP == 0,
        f"{prefix}width",
        width,
        f"a multiple of {_WIDTH_STEP} (2-D sine-cosine positions): {_multiples_around(width, _WIDTH_STEP)}",
    )
    check(depth >= 1, f"{prefix}depth", depth, "1 or more")
    check(
        heads >= 1 and width % heads == 0,
        f"{prefix}heads",
        heads,
        f"a divisor of the width {width}: {_divisors_around(heads, width)}"
        + (f"; or set {prefix}width to {_multiples_around(width, math.lcm(heads, _WIDTH_STEP))}" if heads > 1 else ""),
    )


def _multiples_around(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} or {below + step}" if below > 0 else str(step)


def _divisors_around(wanted: int, number: int) -> str:
    """Return the divisors of a number that are nearest to `wanted`, which may itself be one."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    nearest = {*[d for d in divisors if d <= wanted][-1:], *[d for d in divisors if d >= wanted][:1]}
    return " or ".join(map(str, sorted(nearest)))


def _common_divisors(rows: int, columns: int) -> list[int]:
    """Return the common divisors that are greater than 1."""
    return [n for n in range(2, min(rows, columns) + 1) if rows % n == 0 and columns % n == 0]
