"""Trained model as the exports see it: weights, description, and the outputs that each export is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float32
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.errors import UserError
from mae.formats.facts import LAYER_NORM_EPS
from mae.formats.opening import Normalization, StoredModel, open_model
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import HeadKind
from mae.models.description import ModelDescription
from mae.models.network import build_network, head_of
from mae.models.weights import encoder_part
from mae.run_files import beside


@dataclass(frozen=True)
class TrainedModel:
    """Model to export."""

    path: Path
    """File that the weights are from."""
    description: ModelDescription
    weights: Mapping[str, Tensor]
    """All tensors in float32 on the CPU, by their names in a model file."""
    sha256: str = ""
    """Hash of the file."""
    stored: StoredModel | None = field(default=None, repr=False, compare=False)
    """Files that hold it, without their tensors; None for a model whose file is not there yet."""

    def beside(self, name: str) -> Path:
        """Return the place for an export of that name if none is given."""
        return beside(self.path, name) if self.stored is None else self.stored.beside(name)

    @property
    def encoder_weights(self) -> dict[str, Tensor]:
        """The encoder's tensors by timm's names."""
        return encoder_part(self.weights)

    @property
    def head(self) -> HeadKind | None:
        """Kind of the classifier's head; None without a head."""
        found = head_of(self.weights)
        return found and found[0]

    @property
    def has_plain_head(self) -> bool:
        """Whether the head is one linear layer on one kind of token, as the classifiers of most libraries have it."""
        return self.head == "linear" and self.description.pool != "cls+avg"

    @property
    def head_names(self) -> list[str]:
        """Names of the head's tensors."""
        return [name for name in self.weights if name.startswith("head.")]

    @property
    def decoder_names(self) -> list[str]:
        """Names of the decoder's tensors."""
        encoder = self.encoder_weights
        return [name for name in self.weights if name not in encoder and name not in self.head_names]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label; their numbers where the model knows no names, and () without a head."""
        found = head_of(self.weights)
        return self.description.class_names(found[1] if found else 0)

    @cached_property
    def network(self) -> VisionTransformer | MaskedAutoencoder:
        """The whole network in evaluation mode, without gradients."""
        return build_network(self.description, self.weights, self.path).eval().requires_grad_(False)

    @property
    def vit(self) -> VisionTransformer:
        """Encoder, with its head if the model is a classifier."""
        network = self.network
        return network.encoder if isinstance(network, MaskedAutoencoder) else network

    def images(self, count: int = 4) -> Float32[Tensor, "count channels height width"]:
        """Return random normalised images, the same in each call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.description.channels, *self.description.image_size, generator=generator)

    def tokens(
        self, images: Float32[Tensor, "batch channels height width"]
    ) -> Float32[Tensor, "batch tokens encoder_width"]:
        """Return the cls token and the patch tokens, which are normed except in a model that pools by `avg`."""
        with torch.no_grad():
            tokens: Tensor = self.vit.forward_features(images)
        return tokens

    def features(self, images: Float32[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch feature"]:
        """Return what the head sees: the normed tokens of the description's `pool`."""
        with torch.no_grad():
            features: Tensor = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)
        return features

    def logits(self, images: Float32[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch classes"]:
        """Return the logits of a classifier."""
        with torch.no_grad():
            logits: Tensor = self.vit(images)
        return logits

    def predicted(
        self, images: Float32[Tensor, "batch channels height width"]
    ) -> Float32[Tensor, "batch patches pixels"]:
        """Return the decoder's prediction of every patch from those that a random mask leaves, the same in each call.

        Raises:
            ValueError: if the model has no decoder.
        """
        if not isinstance(self.network, MaskedAutoencoder):
            raise ValueError(f"{self.path} has no decoder")
        noise = torch.rand(len(images), self.network.patches, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted: Tensor = self.network.predict_all(images, noise)
        return predicted


def read_trained_model(
    source: str | PathLike[str], normalization: Normalization | None = None, heads: int | None = None
) -> TrainedModel:
    """Read a model to export, as `open_model` does; of a fine-tuning run that measured its accuracy, the best one.

    Raises:
        UserError: if there is no model, it is damaged, it is of a kind that cannot be read or exported, or nothing says
            how its images were normalised.
    """
    stored = open_model(source, normalization, heads, best=True).require_normalization()
    require_our_norms(stored)
    weights = {name: tensor.float() for name, tensor in stored.weights.items()}
    return TrainedModel(stored.path, stored.description, weights, stored.sha256, replace(stored, tensors={}))


def require_our_norms(stored: StoredModel) -> None:
    """Raise a `UserError` if the layer norms of a model add another number to the variance than those of exports."""
    if stored.eps != LAYER_NORM_EPS:
        raise UserError(
            f"the layer norms of {stored.source} add {stored.eps:g} to a variance, those of exports add "
            f"{LAYER_NORM_EPS:g}, so outputs would differ; fine-tune it here (mae finetune --init), and export that run"
        )
