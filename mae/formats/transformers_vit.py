"""Names of Hugging Face transformers for the tensors of a ViT, a classifier, and the autoencoder of ViTMAE.

Its files have names that every version reads (`encoder.layer.0.attention.attention.query.weight`), its modules of
version 5 have shorter ones (`layers.0.attention.q_proj.weight`). Both are read; the first are written.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from mae.formats.key_map import KeyMap, Renamed, renamed_from, renamed_to

TransformersKind = Literal["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"]
"""Class of transformers whose names are meant."""

_BLOCK: KeyMap = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.qkv.": tuple(f"attention.attention.{part}." for part in ("query", "key", "value")),
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_BLOCK_OF_VERSION_5: KeyMap = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.qkv.": tuple(f"attention.{part}_proj." for part in ("q", "k", "v")),
    "attn.proj.": "attention.o_proj.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
_ENCODER: dict[str, str | tuple[str, ...]] = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
_HEAD: dict[str, str | tuple[str, ...]] = {"head.": "classifier."}
_DECODER: dict[str, str | tuple[str, ...]] = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed.": "decoder.decoder_embed.",
    "decoder_norm.": "decoder.decoder_norm.",
    "decoder_pred.": "decoder.decoder_pred.",
}
NOT_OURS = ("pooler.", "vit.pooler.", "embeddings.mask_token", "vit.embeddings.mask_token")
"""Beginnings of names of tensors that a plain ViT has no place for: they are left behind."""


def _blocks(ours: str, theirs: str, block: KeyMap) -> dict[str, str | tuple[str, ...]]:
    """Return the table of the tensors of all blocks."""
    table: dict[str, str | tuple[str, ...]] = {}
    for name, other in block.items():
        parts = tuple(f"{theirs}{part}" for part in ((other,) if isinstance(other, str) else other))
        table[f"{ours}{name}"] = parts[0] if len(parts) == 1 else parts
    return table


def _within(prefix: str, table: KeyMap) -> dict[str, str | tuple[str, ...]]:
    return _blocks("", prefix, table)


_PLAIN = _ENCODER | _blocks("blocks.#.", "encoder.layer.#.", _BLOCK)
_PLAIN_OF_VERSION_5 = _ENCODER | _blocks("blocks.#.", "layers.#.", _BLOCK_OF_VERSION_5)
KEY_MAPS: Mapping[TransformersKind, KeyMap] = {
    "ViTModel": _PLAIN,
    "ViTForImageClassification": _within("vit.", _PLAIN) | _HEAD,
    "ViTMAEForPreTraining": _within("vit.", _PLAIN)
    | _DECODER
    | _blocks("decoder_blocks.#.", "decoder.decoder_layers.#.", _BLOCK),
}
"""Names to write, by the class that is to load them."""
_READ: tuple[KeyMap, ...] = (
    *(_within(prefix, plain) for plain in (_PLAIN, _PLAIN_OF_VERSION_5) for prefix in ("", "vit.")),
    _HEAD | _DECODER,
    _blocks("decoder_blocks.#.", "decoder.decoder_layers.#.", _BLOCK),
    _blocks("decoder_blocks.#.", "decoder.decoder_layers.#.", _BLOCK_OF_VERSION_5),
    # Version 5.24 writes this: it renames the `layers.` within `decoder_layers.` too.
    _blocks("decoder_blocks.#.", "decoder.decoder_encoder.layer.#.", _BLOCK),
)


def to_transformers(weights: Mapping[str, Tensor], kind: TransformersKind) -> dict[str, Tensor]:
    """Rename tensors of this program for a class of transformers; those that it has no place for are left out.

    `mae.formats.key_map.without_place(weights, KEY_MAPS[kind])` names them.
    """
    return renamed_to(weights, KEY_MAPS[kind])


def from_transformers(weights: Mapping[str, Tensor]) -> Renamed:
    """Rename the tensors of a ViT or ViTMAE of transformers, whichever its class and its version are."""
    renamed = Renamed({}, {})
    for key_map in _READ:
        found = renamed_from(weights, key_map)
        renamed = Renamed(renamed.weights | found.weights, renamed.names | found.names)
    return renamed
