"""Names of timm's `VisionTransformer`, which are those of this program."""

from collections.abc import Mapping

from torch import Tensor

from mae.formats.key_map import KeyMap, Renamed, renamed_from, renamed_to

ENCODER = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.",
    *(f"blocks.#.{part}." for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "norm.",
    "fc_norm.",
)
"""Tensors of an encoder; `fc_norm` takes the place of `norm` where the mean of the patch tokens is read."""
HEAD = ("head.",)
"""Tensors of a linear head."""
KEY_MAP: KeyMap = {name: name for name in (*ENCODER, *HEAD)}


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that timm has a place for; `without_place(weights, KEY_MAP)` names the others."""
    return renamed_to(weights, KEY_MAP)


def from_timm(weights: Mapping[str, Tensor]) -> Renamed:
    """Return the tensors of a plain ViT of timm."""
    return renamed_from(weights, KEY_MAP)
