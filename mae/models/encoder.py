"""The encoder: a timm `VisionTransformer` whose state dict has exactly timm's `num_classes=0` keys."""

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.positions import sincos_positions
from mae.models.settings import EncoderSettings


def build_encoder(
    settings: EncoderSettings, image_size: tuple[int, int], channels: int, drop_path: float = 0.0
) -> VisionTransformer:
    """A ViT with a cls token, fixed sine-cosine positions and the paper's initialisation.

    Its features are the normed cls token; timm's own `forward` works as ever.
    """
    width, depth, heads = settings.shape
    grid = settings.grid(image_size)
    encoder = VisionTransformer(
        img_size=image_size,
        patch_size=settings.patch,
        in_chans=channels,
        num_classes=0,
        global_pool="token",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        weight_init="skip",
    )
    encoder.apply(init_weights)
    init_patch_embedding(encoder.patch_embed.proj)
    nn.init.normal_(encoder.cls_token, std=0.02)
    encoder.pos_embed = nn.Parameter(sincos_positions(grid, width), requires_grad=False)
    return encoder


def encode_visible(
    encoder: VisionTransformer,
    visible: Float[Tensor, "batch kept pixels"],
    ids_keep: Int64[Tensor, "batch kept"],
) -> list[Float[Tensor, "batch kept+1 encoder_width"]]:
    """Embed and encode the kept patches only, `visible` as `patchify` cuts them.

    Returns:
        The tokens before the first block and after each, the last not yet normed: the cls token, then the patches as
        in `ids_keep`.
    """
    projection = encoder.patch_embed.proj
    # `patchify` runs (row, column, channel) within a patch, the convolution's weight (channel, row, column).
    cells = visible.view(*visible.shape[:2], *projection.kernel_size, -1)
    pixels = cells.permute(0, 1, 4, 2, 3).flatten(2)
    patch_tokens = nn.functional.linear(pixels, projection.weight.flatten(1), projection.bias)
    patch_tokens = patch_tokens + encoder.pos_embed[0, 1:][ids_keep]
    cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(visible), -1, -1)
    layers = [torch.cat([cls_token, patch_tokens], dim=1)]
    for block in encoder.blocks:
        layers.append(block(layers[-1]))
    return layers


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, as the paper's appendix A.1 has it."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_patch_embedding(projection: nn.Conv2d) -> None:
    """The patch embedding is a linear layer over a patch's pixels, and is initialised as one."""
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    assert projection.bias is not None
    nn.init.zeros_(projection.bias)
