"""Export to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

The folder holds `model.safetensors`, which is the encoder by timm's names in float32, and `config.json` with the
architecture and the normalisation. Before the folder appears, timm loads it, and the features are compared. It needs
timm 1.0.26 or newer: older versions take the file of such a folder for a pickle and fail.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mae.export.publish import new_folder, require_equal_features
from mae.files import write_atomically
from mae.models.description import ModelDescription
from mae.models.encoder import build_encoder
from mae.models.weights import encoder_part, load_encoder, write_weights

TOLERANCE = 1e-6
"""Greatest difference of a feature between this program's encoder and timm's."""

# timm's entry for each width of our sizes; model_args override the entry's width, depth and patch size.
_ARCHITECTURES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
# timm before 1.0.31 assumes that all weights have 3 channels: if the config named the layer that reads the image, it
# would fill a layer of 2 or 5 channels with random weights.
_CONVERTED_CHANNELS = (1, 3)
_COMPARED_IMAGES = 4
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def export_timm(weights: dict[str, Tensor], description: ModelDescription, out: Path, source: Path) -> float:
    """Write the encoder for timm into the folder `out`, and return the greatest difference of a feature.

    Raises:
        UserError: if `out` holds anything else than this export, or the model that timm loads gives other features
            than the encoder.
    """
    if description.pool == "cls+avg":
        description = replace(description, pool="cls")  # timm's features are one of both; the tensors are the same
    with new_folder(out, (_WEIGHTS, _CONFIG)) as part:
        encoder = {name: tensor.float() for name, tensor in encoder_part(weights).items()}
        write_weights(part / _WEIGHTS, encoder, replace(description, decoder=None).metadata())
        write_atomically(part / _CONFIG, json.dumps(timm_config(description), indent=2).encode())
        difference = compare(part, weights, description, source)
        require_equal_features("timm", difference, TOLERANCE)
    return difference


def timm_config(description: ModelDescription) -> dict[str, Any]:
    """Return the content of `config.json` in a timm model folder."""
    height, width = description.image_size
    pool = "avg" if description.pool == "avg" else "token"
    # timm has no such entry: whoever prepares images of more than 8 bits has to read it.
    value_range = {} if description.value_range is None else {"value_range": list(description.value_range)}
    return value_range | {
        "architecture": _ARCHITECTURES.get(description.width, "vit_base_patch16_224"),
        "num_classes": 0,
        "num_features": description.width,
        "global_pool": pool,
        "model_args": {
            "img_size": [height, width],
            "patch_size": list(description.patch_size),
            "in_chans": description.channels,
            "embed_dim": description.width,
            "depth": description.depth,
            "num_heads": description.heads,
            "global_pool": pool,
        },
        "pretrained_cfg": {
            "tag": "mae",
            "custom_load": False,
            "input_size": [description.channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": description.crop_pct,
            "crop_mode": "center",
            "mean": list(description.mean),
            "std": list(description.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj" if description.channels in _CONVERTED_CHANNELS else None,
            "classifier": "head",
        },
    }


def compare(folder: Path, weights: dict[str, Tensor], description: ModelDescription, source: Path) -> float:
    """Load `folder` with timm, and return the greatest difference between its features and ours, on random images."""
    encoder, size, channels = description.encoder(), description.image_size, description.channels
    ours = build_encoder(encoder, size, channels, pool=description.pool).eval()
    load_encoder(ours, weights, source)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_COMPARED_IMAGES, channels, *size, generator=generator)
    with torch.no_grad():
        return float((ours(images) - theirs(images)).abs().max())
