import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.execution import Checkpointing, checkpoint_activations
from mae.models.settings import EncoderSettings

PROGRAM = Path(__file__).parent / "compiled.py"


@pytest.mark.parametrize(
    ("backend", "kinds", "tolerance"),
    [
        ("aot_eager", ["self"], 0.0),
        pytest.param("aot_eager", ["cross", "deep classifier"], 1e-6, marks=pytest.mark.slow),
        pytest.param("inductor", ["self", "cross", "classifier"], 1e-5, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_compute_what_plain_ones_do(backend: str, kinds: list[str], tolerance: float) -> None:
    """Also with activation checkpointing (all but `self`), drop path, and on another number of images. Every block is
    compiled, as a whole: torch falls back in silence where it cannot, or has to too often.
    """
    done = subprocess.run(
        [sys.executable, str(PROGRAM), backend, *kinds],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Kinds of blocks in training, and once more without gradients; each rate of drop path is a kind.
    graphs = {"self": 2 * 3, "cross": 2 * 2, "classifier": 2 + 1, "deep classifier": 9 + 1}
    for kind, found in json.loads(done.stdout).items():
        assert found["difference"] <= tolerance, kind
        assert found["graphs"] >= graphs[kind], kind
        assert not found["breaks"], kind
        assert found["same_names"], kind
    assert "recompile_limit" not in done.stderr


def step(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], int]:
    """Loss and gradients, and the bytes that autograd keeps for the backward pass beside parameters."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)  # for drop path
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model(*inputs)
        loss = found.loss if isinstance(model, MaskedAutoencoder) else found.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], sum(kept.values())


@pytest.mark.parametrize(("checkpointing", "less"), [("gelu", 0.9), ("blocks", 1 / 3)])
@pytest.mark.parametrize("kind", ["self", "cross", "classifier"])
def test_checkpointed_activations_change_no_bit_and_save_memory(
    kind: str,
    checkpointing: Checkpointing,
    less: float,
    tiny_autoencoder: Callable[..., MaskedAutoencoder],
    draw: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    results = []
    for chosen in ("none", checkpointing):
        model: Any = tiny_autoencoder(decoder=kind, depth=6, decoder_depth=3) if kind != "classifier" else None
        torch.manual_seed(0)
        if model is None:
            settings = EncoderSettings(width=16, depth=6, heads=2, patch_size=(4,))
            model = build_classifier(settings, (16, 16), 3, 4, "mlp", drop_path=0.5)
            inputs: tuple[Tensor, ...] = (torch.randn(4, 3, 16, 16),)
        else:
            inputs = draw(model, 4)
        names = list(model.state_dict())
        checkpoint_activations(model, chosen)
        assert list(model.state_dict()) == names
        results.append(step(model, inputs))
    (expected, all_kept), (found, kept) = results
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert kept < less * all_kept


def test_without_gradients_nothing_is_computed_twice_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_classifier(EncoderSettings(width=16, depth=1, heads=2, patch_size=(4,)), (16, 16), 3, 4, "linear")
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    runs = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *rest: runs.append(self) or forward(self, *rest))
    checkpoint_activations(model, "blocks")
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert len(runs) == 1
    model(images).sum().backward()
    assert len(runs) == 3
