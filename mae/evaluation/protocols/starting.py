"""The encoder that a protocol begins from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.inference.model import Model
from mae.models.classifier import build_classifier
from mae.models.description import ModelDescription
from mae.models.encoder import build_encoder
from mae.models.weights import encoder_part, load_encoder


@dataclass(frozen=True)
class Start:
    """Shape of an encoder, and its weights; without weights, it starts from random ones."""

    description: ModelDescription
    weights: Mapping[str, Tensor] | None = None
    path: Path = Path()
    """File that the weights are from."""

    @classmethod
    def of(cls, model: Model) -> "Start":
        """Return the encoder of a model, without its head or decoder."""
        return cls(model.description, encoder_part(model.encoder.state_dict()), model.path)

    def frozen_encoder(self) -> VisionTransformer:
        """Return the encoder, none of whose parameters is trained."""
        described = self.description
        encoder = build_encoder(described.encoder(), described.image_size, described.channels)
        return self._loaded(encoder).requires_grad_(False)

    def classifier(self, classes: int, drop_path: float) -> VisionTransformer:
        """Return the encoder with a new linear head on its normed cls token, all of whose parameters are trained."""
        described = self.description
        size, channels = described.image_size, described.channels
        return self._loaded(build_classifier(described.encoder(), size, channels, classes, "linear", drop_path))

    def _loaded(self, vit: VisionTransformer) -> VisionTransformer:
        if self.weights is not None:
            load_encoder(vit, self.weights, self.path)
        return vit
