"""Trained encoder of a run or checkpoint, ready to give features."""

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from mae.models.description import ModelDescription, find_model, read_description
from mae.models.encoder import build_encoder
from mae.models.weights import load_encoder, read_weights


def trained_encoder(source: Path) -> tuple[VisionTransformer, ModelDescription]:
    """Return the encoder of a finished run, checkpoint folder or model file, in evaluation mode, and its description.

    The encoder takes normalised images of the size, channels, mean and std of the description, and returns the normed
    cls token [batch width].

    Raises:
        UserError: if there is no model, or it was not written by this program.
    """
    path = find_model(source)
    description = read_description(path)
    encoder = build_encoder(description.encoder(), description.image_size, description.channels).eval()
    load_encoder(encoder, read_weights(path), path)
    return encoder, description
