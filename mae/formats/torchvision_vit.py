"""Names of torchvision's `VisionTransformer`."""

from collections.abc import Mapping

from torch import Tensor

from mae.formats.key_map import KeyMap, Renamed, renamed_from, renamed_to

_BLOCK = {
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "self_attention.in_proj_",
    "attn.proj.": "self_attention.out_proj.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
}
KEY_MAP: KeyMap = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "norm.": "encoder.ln.",
    "head.": "heads.head.",
} | {f"blocks.#.{ours}": f"encoder.layers.encoder_layer_#.{theirs}" for ours, theirs in _BLOCK.items()}
"""Names to write."""
# The published files are older than these names of the two layers.
_OLD_NAMES: KeyMap = {
    "blocks.#.mlp.fc1.": "encoder.layers.encoder_layer_#.mlp.linear_1.",
    "blocks.#.mlp.fc2.": "encoder.layers.encoder_layer_#.mlp.linear_2.",
}
NOT_OURS = ("heads.pre_logits.",)
"""Beginnings of names of tensors that a plain ViT has no place for: they are left behind, with the head above them."""


def to_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of this program for torchvision; those that it has no place for are left out.

    `mae.formats.key_map.without_place(weights, KEY_MAP)` names them.
    """
    return renamed_to(weights, KEY_MAP)


def from_torchvision(weights: Mapping[str, Tensor]) -> Renamed:
    """Rename the tensors of torchvision's ViT."""
    new, old = renamed_from(weights, KEY_MAP), renamed_from(weights, _OLD_NAMES)
    return Renamed(new.weights | old.weights, new.names | old.names)
