"""Facts of a model that its tensors do not show, as the config of its folder or its header says them."""

from dataclasses import dataclass

from mae.models.description import ModelDescription
from mae.models.vit import TokenKind

LAYER_NORM_EPS = 1e-6
"""Number that the layer norms of this program's models add to a variance."""


@dataclass(frozen=True)
class Facts:
    """Facts beside the tensors, some of which the tensors show, too; None: nothing says so."""

    heads: int | None = None
    width: int | None = None
    depth: int | None = None
    patch_size: tuple[int, int] | None = None
    channels: int | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    value_range: tuple[float, ...] | None = None
    """Range of the values of images of more than 8 bits, as in `DataSettings.value_range`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes by label."""
    head_reads: TokenKind = "cls"
    """Tokens that the head of a classifier reads, if the norm before it is that of each token."""
    decoder_heads: int | None = None
    mask_ratio: float | None = None
    norm_pix_loss: bool | None = None
    eps: float = LAYER_NORM_EPS
    """Number that its layer norms add to a variance."""
    remarks: tuple[str, ...] = ()
    """What is different here, in words."""


def facts_of(description: ModelDescription) -> Facts:
    """Return the facts of a model that this program has exported to another library, and described there."""
    decoder = description.decoder
    return Facts(
        heads=description.heads,
        width=description.width,
        depth=description.depth,
        patch_size=description.patch_size,
        channels=description.channels,
        image_size=description.image_size,
        mean=description.mean,
        std=description.std,
        crop_pct=description.crop_pct,
        value_range=description.value_range,
        classes=description.classes,
        decoder_heads=None if decoder is None else decoder.heads,
        mask_ratio=None if decoder is None else decoder.mask_ratio,
        norm_pix_loss=None if decoder is None else decoder.norm_pix_loss,
    )
