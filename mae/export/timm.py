"""Export to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

The folder holds `model.safetensors`, which has timm's names, and `config.json` with the architecture, the normalisation
and the names of the classes. It needs timm 1.0.26 or newer: older versions take the file of such a folder for a pickle
and fail. transformers loads the folder too, through timm.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.files import write_atomically
from mae.models.description import ModelDescription
from mae.models.vit import TokenKind
from mae.models.weights import write_weights

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


class Timm(Target):
    """timm folder: the encoder, with the head of a classifier if that is one linear layer."""

    name = "timm"
    library = "timm 1.0.26 or newer"
    tolerance = 1e-6
    hub_library = "timm"

    def keeps_head(self, model: TrainedModel) -> bool:
        """Return whether the head is one linear layer on one kind of token."""
        return model.has_plain_head

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write weights and config."""
        # timm's features are one kind of token; the tensors are the same.
        pool: TokenKind = "avg" if model.description.pool == "avg" else "cls"
        description = replace(model.description, decoder=None, pool=pool)
        write_weights(folder / "model.safetensors", self.kept(model), description.metadata())
        write_atomically(
            folder / "config.json",
            json.dumps(
                timm_config(model.description, model.classes if model.has_plain_head else ()), indent=2
            ).encode(),
        )

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare all tokens, and the logits of a classifier or the features of an encoder."""
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images = model.images()
        tokens = model.tokens(images)
        yield compare("tokens", tokens, theirs.forward_features(images).detach())
        output = theirs(images).detach()
        if model.has_plain_head:
            yield compare("logits", model.logits(images), output)
        else:
            features = model.features(images) if model.description.pool == "avg" else tokens[:, 0]
            yield compare("features", features, output)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of timm."""
        output = "logits" if model.has_plain_head else "features"
        return (
            "import timm\n"
            f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
            f"{output} = model(images)"
        )


def timm_config(description: ModelDescription, classes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the content of `config.json` in a timm model folder; `classes` are those of a head in the same file."""
    height, width = description.image_size
    pool = "avg" if description.pool == "avg" else "token"
    # timm has no such entry: whoever prepares images of more than 8 bits has to read it.
    value_range = {} if description.value_range is None else {"value_range": list(description.value_range)}
    labels = {"label_names": list(classes)} if classes else {}
    return value_range | {
        "architecture": _ARCHITECTURES.get(description.width, "vit_base_patch16_224"),
        "num_classes": len(classes),
        "num_features": description.width,
        "global_pool": pool,
        # Without num_classes here: transformers gives it too, and fails if it comes twice.
        "model_args": {
            "img_size": [height, width],
            "patch_size": list(description.patch_size),
            "in_chans": description.channels,
            "embed_dim": description.width,
            "depth": description.depth,
            "num_heads": description.heads,
            "global_pool": pool,
        },
        **labels,
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
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj" if description.channels in _CONVERTED_CHANNELS else None,
            "classifier": "head",
        },
    }
