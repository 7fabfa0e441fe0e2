"""The ViT of timm that is encoder and classifier, with the paper's starting weights."""

from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.blocks import init_weights
from mae.models.patches import grid_size
from mae.models.positions import sincos_positions
from mae.models.sizes import TEMPERATURE, Size

TokenKind = Literal["cls", "avg", "cls+avg"]
"""Token to read: the cls token, the mean of the patch tokens, or both, one after the other."""


class ClsAndMeanTransformer(VisionTransformer):  # type: ignore[misc]
    """ViT whose features are the cls token and the mean of the patch tokens; timm's own has one of them."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Return the features of normed tokens: [batch tokens width] -> [batch 2 width]."""
        return torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)


def build_vit(
    shape: Size,
    patch_size: tuple[int, int],
    image_size: tuple[int, int],
    channels: int,
    drop_path: float = 0.0,
    pool: TokenKind = "cls",
    temperature: float = TEMPERATURE,
) -> VisionTransformer:
    """Return a ViT with a cls token, fixed sine-cosine positions and the paper's initialisation.

    Its features are the tokens of `pool`, normed. For `avg`, the norm follows the mean, and is called `fc_norm` as in
    timm and in the published fine-tuning; otherwise each token is normed. timm's own `forward` works as usual.
    """
    width, depth, heads = shape
    kind = ClsAndMeanTransformer if pool == "cls+avg" else VisionTransformer
    vit = kind(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=0,
        global_pool="avg" if pool == "avg" else "token",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        weight_init="skip",
    )
    vit.apply(init_weights)
    init_patch_embedding(vit.patch_embed.proj)
    nn.init.normal_(vit.cls_token, std=0.02)
    positions = sincos_positions(grid_size(image_size, patch_size), width, temperature)
    vit.pos_embed = nn.Parameter(positions, requires_grad=False)
    return vit


def init_patch_embedding(projection: nn.Conv2d) -> None:
    """Initialise the patch embedding as the linear layer over a patch's pixels that it is."""
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    assert projection.bias is not None
    nn.init.zeros_(projection.bias)
