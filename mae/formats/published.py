"""Names of timm's `VisionTransformer` and of the published masked autoencoders, which are those of this program.

A published file is `{"model": tensors}`: the encoder, a classifier whose head reads the mean of the patch tokens, or
encoder and decoder.
"""

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
DECODER = (
    "mask_token",
    "decoder_pos_embed",
    "decoder_embed.",
    *(f"decoder_blocks.#.{part}." for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "decoder_norm.",
    "decoder_pred.",
)
KEY_MAP: KeyMap = {name: name for name in (*ENCODER, *HEAD, *DECODER)}


def to_published(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the content of a file to save with torch; `without_place(weights, KEY_MAP)` names what it leaves out."""
    return {"model": renamed_to(weights, KEY_MAP)}


def from_published(weights: Mapping[str, Tensor]) -> Renamed:
    """Return the tensors of a published encoder, classifier or autoencoder."""
    return renamed_from(weights, KEY_MAP)
