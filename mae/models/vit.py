"""The ViT of timm that is encoder and classifier, with the paper's starting weights."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.models.blocks import init_weights
from mae.models.patches import grid_size
from mae.models.positions import sincos_positions
from mae.models.sizes import Size


def build_vit(
    shape: Size, patch_size: tuple[int, int], image_size: tuple[int, int], channels: int, drop_path: float = 0.0
) -> VisionTransformer:
    """Return a ViT with a cls token, fixed sine-cosine positions and the paper's initialisation.

    Its features are the normed cls token; timm's own `forward` works as usual.
    """
    width, depth, heads = shape
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=0,
        global_pool="token",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        weight_init="skip",
    )
    vit.apply(init_weights)
    init_patch_embedding(vit.patch_embed.proj)
    nn.init.normal_(vit.cls_token, std=0.02)
    vit.pos_embed = nn.Parameter(sincos_positions(grid_size(image_size, patch_size), width), requires_grad=False)
    return vit


def init_patch_embedding(projection: nn.Conv2d) -> None:
    """Initialise the patch embedding as the linear layer over a patch's pixels that it is."""
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    assert projection.bias is not None
    nn.init.zeros_(projection.bias)
