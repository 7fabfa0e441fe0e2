"""Export to the layout of the published masked autoencoders: files of torch with `{"model": weights}`.

Beside the weights, each file holds the description that is the header of our own files; other programs pass over it.
`encoder.pth` is laid out as the published encoders and, with the head of a classifier, as the published classifiers.
`full.pth`, which has the decoder too, is laid out as those that reconstruct images. The names of all tensors are the
published ones already; a decoder that was not published has no such names, and is left behind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.files import written_atomically
from mae.formats.published import to_published
from mae.models.description import ModelDescription

_ENCODER, _FULL = "encoder.pth", "full.pth"


class Published(Target):
    """Files for code that reads the published checkpoints."""

    name = "mae"
    library = "code for the published checkpoints"
    tolerance = 1e-6

    def keeps_head(self, model: TrainedModel) -> bool:
        """Return whether the head is one linear layer on one kind of token."""
        return model.has_plain_head

    def left_behind(self, model: TrainedModel) -> Sequence[str]:
        """Return the tensors of a decoder of another kind, and of a head that the published classifiers do not have."""
        left = super().left_behind(model)
        return [name for name in left if name not in model.decoder_names] if _has_published_decoder(model) else left

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the encoder, and encoder and decoder together if there is a decoder."""
        head = model.head_names if model.has_plain_head else []
        weights = model.encoder_weights | {name: model.weights[name] for name in head}
        _save(folder / _ENCODER, weights, replace(model.description, decoder=None))
        if _has_published_decoder(model):
            _save(folder / _FULL, dict(model.weights), model.description)

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare all tokens, the logits of a classifier, and the pixels that a decoder predicts."""
        images = model.images()
        description = replace(model.description, decoder=None)
        encoder = TrainedModel(folder / _ENCODER, description, _load(folder / _ENCODER))
        yield compare("tokens", model.tokens(images), encoder.tokens(images))
        if model.has_plain_head:
            yield compare("logits", model.logits(images), encoder.logits(images))
        if _has_published_decoder(model):
            full = TrainedModel(folder / _FULL, model.description, _load(folder / _FULL))
            yield compare("predicted pixels", model.predicted(images), full.predicted(images))

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of torch."""
        return f'import torch\nweights = torch.load("{folder}/{_ENCODER}", weights_only=True)["model"]'


def _has_published_decoder(model: TrainedModel) -> bool:
    decoder = model.description.decoder
    return decoder is not None and decoder.kind == "self" and model.decoder_names != []


def _save(path: Path, weights: dict[str, Tensor], description: ModelDescription) -> None:
    # Each tensor has storage of its own, so that the file holds nothing else.
    content = to_published({name: tensor.clone() for name, tensor in weights.items()})
    with written_atomically(path) as file:
        torch.save(content | description.metadata(), file)


def _load(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return weights
