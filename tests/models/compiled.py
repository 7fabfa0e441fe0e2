"""Compiled models beside plain ones, as JSON.

A program of its own, for jaxtyping's import hook does not go with compiling.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.execution import checkpoint_activations, compile_blocks
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings

SHAPE: dict[str, Any] = {"width": 16, "heads": 2, "patch_size": (4,)}
DECODER = {"decoder_width": 12, "decoder_depth": 2, "decoder_heads": 3}
# More rates of drop path than torch compiles versions of a function by default.
DEEP = 9


def autoencoder(decoder: Any) -> nn.Module:
    settings = MaskedAutoencoderSettings(**SHAPE, **DECODER, depth=2, decoder=decoder)
    return MaskedAutoencoder(settings, (16, 16), 3)


def classifier(depth: int) -> nn.Module:
    return build_classifier(EncoderSettings(**SHAPE, depth=depth), (16, 16), 3, 4, "linear", drop_path=0.3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "self": lambda: autoencoder("self"),
    "cross": lambda: autoencoder("cross"),
    "classifier": lambda: classifier(2),
    "deep classifier": lambda: classifier(DEEP),
}


def results(model: nn.Module) -> list[Tensor]:
    """Losses, predictions and gradients: in training, and without gradients on fewer images."""
    torch.manual_seed(1)
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)

    def loss(count: int) -> Tensor:
        if isinstance(model, MaskedAutoencoder):
            return model(images[:count], noise[:count]).loss
        return F.cross_entropy(100 * model(images[:count]), torch.arange(count))

    trained = loss(4)
    trained.backward()
    model.eval()
    with torch.no_grad():
        evaluated = loss(3)
    return [trained.detach(), evaluated, *(p.grad for p in model.parameters() if p.grad is not None)]


def difference(expected: Tensor, found: Tensor) -> float:
    """The greatest, relative to the greatest value if that is above 1."""
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1))


def compare(kind: str, backend: str, checkpointed: bool) -> dict[str, Any]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(MODELS[kind]())
    plain, compiled = models
    names = list(plain.state_dict())
    expected = results(plain)
    counters.clear()
    if checkpointed:
        checkpoint_activations(compiled, "blocks")
    compile_blocks(compiled, backend)
    found = results(compiled)
    return {
        "difference": max(difference(a, b) for a, b in zip(expected, found, strict=True)),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "same_names": list(compiled.state_dict()) == names,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    backend, *kinds = sys.argv[1:]
    json.dump({kind: compare(kind, backend, kind != "self") for kind in kinds}, sys.stdout)
