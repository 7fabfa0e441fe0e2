"""Export to a bare safetensors file: the encoder by timm's names, described in its header."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.models.description import read_description
from mae.models.weights import write_weights

_WEIGHTS = "model.safetensors"


class Safetensors(Target):
    """One safetensors file, which `mae.load` and every reader of safetensors open."""

    name = "safetensors"
    library = "safetensors"
    tolerance = 1e-6

    def keeps_head(self, model: TrainedModel) -> bool:
        """Return that no head is held."""
        return False

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the file."""
        write_weights(folder / _WEIGHTS, self.kept(model), replace(model.description, decoder=None).metadata())

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare all tokens of the encoder that the file describes."""
        path, images = folder / _WEIGHTS, model.images()
        theirs = TrainedModel(path, read_description(path), load_file(path))
        yield compare("tokens", model.tokens(images), theirs.tokens(images))

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of safetensors, whose tensors go into any ViT with timm's names."""
        return f'from safetensors.torch import load_file\nweights = load_file("{folder}/{_WEIGHTS}")'
