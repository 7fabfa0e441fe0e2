"""Models that the tests of exports share, and a short way to export them."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mae.export.exporting import Exported, export_model
from mae.export.trained_model import TrainedModel
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import HeadKind, build_classifier
from mae.models.description import ModelDescription, describe_model
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.vit import TokenKind
from mae.models.weights import file_tensors, write_weights

RECTANGLE = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(2, 4), decoder_width=12, decoder_depth=1, decoder_heads=3
)
SQUARE = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=12, decoder_depth=1, decoder_heads=3
)
# Settings, image size, channels.
MODELS = [(RECTANGLE, (8, 12), 1), (SQUARE, (8, 8), 3), (SQUARE, (8, 16), 5)]


def pretrained(
    settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int
) -> tuple[MaskedAutoencoder, dict[str, Tensor], ModelDescription]:
    torch.manual_seed(0)
    model = MaskedAutoencoder(settings, image_size, channels)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    mean = tuple(0.1 * (channel + 1) for channel in range(channels))
    std = tuple(0.2 * (channel + 1) for channel in range(channels))
    description = describe_model("masked autoencoder", settings, image_size, mean, std, 0.9)
    return model, file_tensors(model), description


def autoencoder(settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int) -> TrainedModel:
    _, weights, description = pretrained(settings, image_size, channels)
    return trained(weights, description)


def classifier(
    head: HeadKind = "linear",
    pool: TokenKind = "cls",
    settings: MaskedAutoencoderSettings = SQUARE,
    image_size: tuple[int, int] = (8, 8),
    channels: int = 3,
) -> TrainedModel:
    """A classifier of three named classes, whose logits are not small."""
    torch.manual_seed(0)
    model = build_classifier(settings, image_size, channels, 3, head, pool=pool)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    mean, std = (0.4,) * channels, (0.2,) * channels
    names = ("cat", "dog", "red panda")
    description = describe_model("classifier", settings, image_size, mean, std, 0.9, names)
    return trained(file_tensors(model), replace(description, pool=pool, decoder=None))


def trained(weights: dict[str, Tensor], description: ModelDescription) -> TrainedModel:
    """The model of these weights, which are in a file somewhere else."""
    path = Path(tempfile.mkdtemp()) / "model.safetensors"
    sha256 = write_weights(path, weights, description.metadata())
    return TrainedModel(path, description, {name: tensor.float() for name, tensor in weights.items()}, sha256)


def export(model: TrainedModel, target: str, out: Path) -> Exported:
    """Export to one target into the folder `out`."""
    (exported,) = export_model(model, [target], out, lambda line: None)
    return exported
