"""The encoder: a timm `VisionTransformer` whose state dict has exactly timm's `num_classes=0` keys."""

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.settings import EncoderSettings
from mae.models.vit import TokenKind, build_vit


def build_encoder(
    settings: EncoderSettings,
    image_size: tuple[int, int],
    channels: int,
    drop_path: float = 0.0,
    pool: TokenKind = "cls",
) -> VisionTransformer:
    """Return the ViT of these settings, whose features are the tokens of `pool`.

    Raises:
        UserError: if the patch size does not divide the image size.
    """
    settings.grid(image_size)
    temperature = settings.position_temperature
    return build_vit(settings.shape, settings.patch, image_size, channels, drop_path, pool, temperature)


def encode_visible(
    encoder: VisionTransformer,
    visible: Float[Tensor, "batch kept pixels"],
    ids_keep: Int64[Tensor, "batch kept"],
) -> list[Float[Tensor, "batch kept+1 encoder_width"]]:
    """Embed and encode the kept patches only.

    Args:
        encoder: A ViT of `build_encoder`.
        visible: Kept patches, with their pixels in the order of `patchify`.
        ids_keep: Places of these patches in the image.

    Returns:
        The tokens before the first block and after each, without the final norm: the cls token, then the patches in the
        order of `ids_keep`.
    """
    projection = encoder.patch_embed.proj
    # Pixels of a patch are ordered (row, column, channel), the convolution's weights (channel, row, column).
    cells = visible.view(*visible.shape[:2], *projection.kernel_size, -1)
    pixels = cells.permute(0, 1, 4, 2, 3).flatten(2)
    patch_tokens = nn.functional.linear(pixels, projection.weight.flatten(1), projection.bias)
    patch_tokens = patch_tokens + encoder.pos_embed[0, 1:][ids_keep]
    cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(visible), -1, -1)
    layers = [torch.cat([cls_token, patch_tokens], dim=1)]
    for block in encoder.blocks:
        layers.append(block(layers[-1]))
    return layers
