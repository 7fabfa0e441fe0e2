"""The encoder: a timm `VisionTransformer` whose state dict has exactly timm's `num_classes=0` keys."""

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.patches import patchify
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
    images: Float[Tensor, "batch channels height width"],
    ids_keep: Int64[Tensor, "batch kept"],
) -> Float[Tensor, "batch kept+1 encoder_width"]:
    """Embed and encode the kept patches only; the cls token comes first, the patches as in `ids_keep`.

    The hidden patches are left out before the embedding, so no arithmetic is spent on them.
    """
    projection = encoder.patch_embed.proj
    pixels = patchify(images, projection.kernel_size)
    visible = pixels.gather(1, ids_keep[:, :, None].expand(-1, -1, pixels.shape[2]))
    # The convolution's weight runs (channel, row, column) within a patch, `patchify` (row, column, channel).
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
    patch_tokens = nn.functional.linear(visible, weight, projection.bias)
    patch_tokens = patch_tokens + encoder.pos_embed[0, 1:][ids_keep]
    cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls_token, patch_tokens], dim=1)
    encoded: Tensor = encoder.norm(encoder.blocks(tokens))
    return encoded


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
