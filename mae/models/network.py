"""The network that a model file holds: an autoencoder, a classifier, or an encoder alone."""

from collections.abc import Mapping
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import HeadKind, build_classifier
from mae.models.description import ModelDescription
from mae.models.encoder import build_encoder
from mae.models.weights import encoder_part, has_decoder, load_all, load_encoder


def build_network(
    description: ModelDescription, weights: Mapping[str, Tensor], source: Path
) -> VisionTransformer | MaskedAutoencoder:
    """Build what the tensors of a file are: an autoencoder, a classifier, or an encoder alone.

    Raises:
        UserError: if the tensors are not those of the described model, naming the first that differ.
    """
    encoder, size, channels = description.encoder(), description.image_size, description.channels
    settings = description.autoencoder()
    if settings is not None and has_decoder(weights):
        autoencoder = MaskedAutoencoder(settings, size, channels)
        load_all(autoencoder, weights, source)
        return autoencoder
    head = head_of(weights)
    if head is not None:
        classifier = build_classifier(encoder, size, channels, head[1], head[0], pool=description.pool)
        load_all(classifier, weights, source)
        return classifier
    vit = build_encoder(encoder, size, channels, pool=description.pool)
    load_encoder(vit, encoder_part(weights), source)
    return vit


def head_of(weights: Mapping[str, Tensor]) -> tuple[HeadKind, int] | None:
    """Return the kind of a classifier's head and its number of classes; None without a head."""
    kinds: dict[HeadKind, str] = {"mlp": "head.fc2.weight", "linear": "head.weight"}
    found = [(kind, len(weights[name])) for kind, name in kinds.items() if name in weights]
    return found[0] if found else None
