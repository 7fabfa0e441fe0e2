"""The whole model as one module with named outputs, for formats that store the computation with the weights."""

from typing import Any

import torch
from jaxtyping import Float32, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae import __version__
from mae.export.trained_model import TrainedModel
from mae.models.description import ModelDescription

COMPARED_BATCHES = (1, 2, 5)
"""Batch sizes of the proof; the one of them that is traced says nothing about the others."""
TRACED_BATCH = 2
"""Images in the batch that is traced: of one image, the exporters take the batch size for a constant."""

_PIXELS = "uint8 [batch, height, width, channels], from 0 to 255"
_NORMALISED = "float32 [batch, channels, height, width]"


class WholeModel(nn.Module):
    """Encoder and head, whose positions are a constant of the image size that the model was trained at."""

    def __init__(self, vit: VisionTransformer, has_features: bool, has_head: bool):
        super().__init__()
        self.vit = vit
        self.has_features = has_features
        self.has_head = has_head

    def forward(self, images: Float32[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Return the outputs of `output_names` for normalised images."""
        tokens = self.vit.forward_features(images)
        outputs = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
        if self.has_features:
            outputs["features"] = self.vit.forward_head(tokens, pre_logits=True)
        if self.has_head:
            outputs["logits"] = self.vit.forward_head(tokens)
        return outputs


class FromPixels(nn.Module):
    """A model behind the normalisation of its images."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: WholeModel, description: ModelDescription):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(description.mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(description.std).view(1, -1, 1, 1) * 255)

    def forward(self, images: UInt8[Tensor, "batch height width channels"]) -> dict[str, Tensor]:
        """Return the model's outputs for pixels as an image library reads them."""
        outputs: dict[str, Tensor] = self.model((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return outputs


def whole_model(model: TrainedModel) -> WholeModel:
    """Return the module of a trained model, on its own tensors."""
    names = output_names(model)
    return WholeModel(model.vit, "features" in names, "logits" in names).eval()


def output_names(model: TrainedModel) -> list[str]:
    """Return the names of the outputs.

    They are `cls` and `patches`, the tokens, of shapes [batch width] and [batch patches width]; `features`
    [batch features], what the head of the description's `pool` sees, unless that is `cls`; and `logits` [batch classes]
    of a classifier.
    """
    features = [] if model.description.pool == "cls" else ["features"]
    return ["cls", "patches", *features, *(["logits"] if model.head else [])]


def expected_outputs(model: TrainedModel, images: Float32[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
    """Return what the outputs should be, computed by the trained model itself."""
    tokens = model.tokens(images)
    outputs = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
    if model.description.pool != "cls":
        outputs["features"] = model.features(images)
    if model.head:
        outputs["logits"] = model.logits(images)
    return outputs


def instructions(model: TrainedModel, takes_pixels: bool = False) -> dict[str, Any]:
    """Return, ready for JSON, what a program has to know to prepare images and to read the outputs.

    Args:
        model: Trained model.
        takes_pixels: Whether the exported model normalises images itself.
    """
    description = model.description
    levels = "pixels"
    if description.value_range is not None:
        levels = "floor((value - low) * 256 / (high - low)) of value_range, from 0 to 255"
    return {
        "input": _PIXELS if takes_pixels else f"{_NORMALISED}: ({levels} / 255 - mean) / std",
        "image_size": list(description.image_size),
        "channels": description.channels,
        "crop_pct": description.crop_pct,
        "resize": "bicubic with antialias, to just cover floor(image_size / crop_pct); then the centre of image_size",
        "mean": list(description.mean),
        "std": list(description.std),
        "value_range": description.value_range and list(description.value_range),
        "outputs": output_names(model),
        "pool": description.pool,
        "labels": list(model.classes),
        "mae_version": __version__,
    }
