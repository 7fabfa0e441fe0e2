"""Export to torchvision: weights for `torchvision.models.VisionTransformer`, and the arguments to build it with.

torchvision's class takes square images of three channels, and reads the cls token.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.files import write_atomically, written_atomically
from mae.formats.torchvision_vit import to_torchvision

_WEIGHTS, _ARGUMENTS = "model.pth", "arguments.json"
_RGB = 3
_MLP_RATIO = 4


class Torchvision(Target):
    """State dict of torchvision's ViT: the encoder, with the head of a classifier if that is one linear layer."""

    name = "torchvision"
    library = "torchvision"
    tolerance = 1e-5

    def refusal(self, model: TrainedModel) -> str | None:
        """Refuse all but square images and patches, three channels, and a norm of the tokens."""
        found = model.description
        if found.channels != _RGB:
            return f"its images have {found.channels} channels, torchvision's ViT takes 3; use timm or onnx"
        for name in ("image_size", "patch_size"):
            height, width = getattr(found, name)
            if height != width:
                return f"its {name} is {height}x{width}, torchvision's ViT takes squares; use timm or onnx"
        if found.pool == "avg":
            return "it pools by avg, torchvision's ViT reads the cls token; use timm or onnx"
        return None

    def keeps_head(self, model: TrainedModel) -> bool:
        """Return whether the head is one linear layer on one kind of token."""
        return model.has_plain_head

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write weights and arguments."""
        with written_atomically(folder / _WEIGHTS) as file:
            torch.save({name: tensor.clone() for name, tensor in to_torchvision(self.kept(model)).items()}, file)
        write_atomically(folder / _ARGUMENTS, json.dumps(_arguments(model), indent=2).encode())

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare the logits of a classifier, or the cls token of an encoder."""
        theirs = VisionTransformer(**json.loads((folder / _ARGUMENTS).read_text()))
        if not model.has_plain_head:
            theirs.heads = nn.Identity()
        theirs.load_state_dict(torch.load(folder / _WEIGHTS, weights_only=True))
        images = model.images()
        with torch.no_grad():
            output: Tensor = theirs.eval()(images)
        if model.has_plain_head:
            yield compare("logits", model.logits(images), output)
        else:
            yield compare("cls token", model.tokens(images)[:, 0], output)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of torchvision."""
        without_head = [] if model.has_plain_head else ["model.heads = torch.nn.Identity()"]
        lines = (
            "import json, pathlib, torch, torchvision",
            f'arguments = json.loads(pathlib.Path("{folder}/{_ARGUMENTS}").read_text())',
            "model = torchvision.models.VisionTransformer(**arguments)",
            *without_head,
            f'model.load_state_dict(torch.load("{folder}/{_WEIGHTS}", weights_only=True))',
            f"{'logits' if model.has_plain_head else 'features'} = model.eval()(images)",
        )
        return "\n".join(lines)


def _arguments(model: TrainedModel) -> dict[str, Any]:
    """Return the arguments of torchvision's class."""
    description = model.description
    return {
        "image_size": description.image_size[0],
        "patch_size": description.patch_size[0],
        "num_layers": description.depth,
        "num_heads": description.heads,
        "hidden_dim": description.width,
        "mlp_dim": _MLP_RATIO * description.width,
    } | ({"num_classes": len(model.classes)} if model.has_plain_head else {})
