"""Muon: which weights it trains, its step by a plain formula, layer decay, and its state in checkpoints."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Muon
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.training.checkpoints.manifest import DataPosition, RunPosition
from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.muon import divide_groups, hidden_matrices
from mae.training.optimizer import (
    OptimSettings,
    build_optimizer,
    describe_groups,
    learning_rates,
    parameter_groups,
    set_learning_rate,
)
from mae.training.state import TrainingState

CPU, DEPTH = torch.device("cpu"), 2
Name = Literal["adamw", "muon"]
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def classifier() -> VisionTransformer:
    torch.manual_seed(0)
    return build_classifier(EncoderSettings(width=8, depth=DEPTH, heads=2, patch_size=(4,)), (8, 8), 3, 5, "mlp")


def autoencoder(decoder: str = "self") -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings = MaskedAutoencoderSettings(
        width=8, depth=DEPTH, heads=2, patch_size=(4,),
        decoder=decoder, decoder_width=8, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    return MaskedAutoencoder(settings, (8, 8), 3)


def optimizer_of(model: nn.Module, name: Name, layer_decay: float = 1.0, weight_decay: float = 0.05) -> Optimizer:
    groups = parameter_groups(model, weight_decay, layer_decay)
    divided = divide_groups(groups, model) if name == "muon" else groups
    return build_optimizer(divided, OptimSettings(name=name), CPU)


def named(model: nn.Module, weights: list[nn.Parameter]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(weight)] for weight in weights]


def in_blocks(prefix: str, depth: int, linear: tuple[str, ...] = LINEAR) -> set[str]:
    return {f"{prefix}.{block}.{layer}.weight" for block in range(depth) for layer in linear}


CROSS = ("cross_attn.q", "cross_attn.kv", "cross_attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (classifier, in_blocks("blocks", DEPTH)),
        (autoencoder, in_blocks("encoder.blocks", DEPTH) | in_blocks("decoder.decoder_blocks", 1)),
        (
            lambda: autoencoder("cross"),
            in_blocks("encoder.blocks", DEPTH) | in_blocks("decoder.decoder_blocks", 1, CROSS),
        ),
    ],
    ids=["classifier", "self", "cross"],
)
def test_muon_trains_the_matrices_of_all_blocks_and_nothing_else(
    build: Callable[[], nn.Module], expected: set[str]
) -> None:
    model = build()
    optimizer = optimizer_of(model, "muon")
    of_muon = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    others = [p for group in optimizer.param_groups if not group["use_muon"] for p in group["params"]]
    assert set(named(model, of_muon)) == set(named(model, hidden_matrices(model))) == expected
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(named(model, [*of_muon, *others])) == sorted(trained)


def test_a_frozen_block_has_no_matrix_to_train() -> None:
    model = classifier()
    model.blocks[0].requires_grad_(False)
    assert set(named(model, hidden_matrices(model))) == in_blocks("blocks", DEPTH) - in_blocks("blocks", 1)


def test_the_lines_of_a_start_say_what_muon_trains() -> None:
    model = classifier()
    lines = describe_groups(optimizer_of(model, "muon", 0.5).param_groups, 1e-3)
    rates = {found[1]: float(found[2]) for line in lines if (found := re.match(r"  (.+?) +peak lr (\S+)  ", line))}
    assert rates == {
        "stem": 1.25e-4,
        "stem, no decay": 1.25e-4,
        "block 0, Muon": 2.5e-4,
        "block 0, no decay": 2.5e-4,
        "block 1, Muon": 5e-4,
        "block 1, no decay": 5e-4,
        "norm and head": 1e-3,
        "norm and head, no decay": 1e-3,
    }
    assert max(map(len, lines)) <= 80


def orthogonalized(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration in bf16 with timm's coefficients: X <- a X + (b A + c A A) X, where A = X X'."""
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm()
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


def test_two_steps_are_those_of_timm_and_of_the_formulas() -> None:
    """Muon on the blocks' matrices; on everything else torch's own AdamW, at the same learning rate and decay."""
    model, plain, timms = autoencoder(), autoencoder(), autoencoder()
    optimizer = optimizer_of(model, "muon", weight_decay=0.1)
    adamw = torch.optim.AdamW(parameter_groups(plain, 0.1), betas=(0.9, 0.95))
    muon = Muon(hidden_matrices(timms), weight_decay=0.1)
    hidden = named(model, hidden_matrices(model))
    momentum = {name: torch.zeros_like(model.get_parameter(name)) for name in hidden}
    torch.manual_seed(1)
    for lr in (1e-2, 3e-3):
        set_learning_rate(optimizer, lr)
        set_learning_rate(adamw, lr)
        muon.param_groups[0]["lr"] = lr
        for name, mine in model.named_parameters():
            mine.grad = torch.randn_like(mine) if mine.requires_grad else None
            if name in hidden:
                timms.get_parameter(name).grad = mine.grad
                momentum[name] = 0.95 * momentum[name] + 0.05 * mine.grad
                by_formula, size = plain.get_parameter(name), 0.2 * max(mine.shape) ** 0.5
                by_formula.data = (1 - lr * 0.1) * by_formula - lr * size * orthogonalized(momentum[name]).float()
            else:
                plain.get_parameter(name).grad = mine.grad
        optimizer.step()
        adamw.step()
        muon.step()
    for name, mine in model.named_parameters():
        if name in hidden:
            assert torch.equal(mine, timms.get_parameter(name)), name
            # bf16 has 8 bits; the root mean square of a step is 0.2 * lr.
            error = (mine - plain.get_parameter(name)).square().mean().sqrt().item()
            assert error < 0.05 * 0.2 * 1e-2, name
        else:
            torch.testing.assert_close(mine, plain.get_parameter(name), rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_equal_gradients_move_each_layer_by_its_layer_decay(name: Name) -> None:
    """The first step does not depend on the gradient's size, so a layer decay that does nothing shows at once."""
    model = classifier()
    optimizer = optimizer_of(model, name, layer_decay=0.5, weight_decay=0.0)
    set_learning_rate(optimizer, 1e-2)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        torch.manual_seed(parameter.numel())  # equal for weights of one shape
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {key: (parameter.detach() - before[key]).norm().item() for key, parameter in model.named_parameters()}
    for layer in LINEAR:
        first, second = (moved[f"blocks.{block}.{layer}.weight"] for block in range(DEPTH))
        assert first == pytest.approx(0.5 * second, rel=1e-4), layer
    assert moved["patch_embed.proj.bias"] == pytest.approx(0.5**3 * moved["norm.bias"], rel=1e-4)
    head, size = moved["head.fc1.weight"], model.head.fc1.weight.numel() ** 0.5
    assert head == pytest.approx(1e-2 * size, rel=1e-3)


def test_the_rates_of_the_layers_are_those_of_the_optimiser() -> None:
    optimizer = optimizer_of(classifier(), "muon", 0.5)
    set_learning_rate(optimizer, 8e-3)
    assert learning_rates(optimizer) == {"stem": 1e-3, "block 0": 2e-3, "block 1": 4e-3, "norm and head": 8e-3}
    assert learning_rates(optimizer_of(autoencoder(), "muon")) == {}


def trained(seed: int, name: Name, steps: int) -> tuple[MaskedAutoencoder, TrainingState]:
    model = autoencoder()
    state = TrainingState(model, optimizer_of(model, name), None)
    torch.manual_seed(seed)
    train(model, state, range(steps))
    return model, state


def train(model: nn.Module, state: TrainingState, steps: range) -> None:
    set_learning_rate(state.optimizer, 1e-2)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, noise = torch.randn(4, 3, 8, 8, generator=generator), torch.rand(4, 4, generator=generator)
        model(images, noise).loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()


def saved(root: Path, state: TrainingState) -> Checkpoint:
    writer = CheckpointWriter(root, keep=1)
    writer.save(state.tensors(), {"format": "pt"}, RunPosition(3, DataPosition(12, "f", 4), {}, {}))
    writer.close()
    found = newest_checkpoint(root, lambda text: None)
    assert found is not None
    return found


def test_a_checkpoint_holds_all_state_and_training_goes_on_with_the_same_bits_c15(tmp_path: Path) -> None:
    model, state = trained(0, "muon", 3)
    found = saved(tmp_path, state)
    assert {key.partition(".")[0] for key in found.tensors("optimizer")} == {
        "momentum_buffer", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    again, resumed = trained(1, "muon", 1)
    resumed.restore(found)
    train(model, state, range(3, 6))
    train(again, resumed, range(3, 6))
    expected, now = state.tensors(), resumed.tensors()
    for group in expected:
        assert expected[group].keys() == now[group].keys()
        assert all(torch.equal(expected[group][key], now[group][key]) for key in expected[group])


@pytest.mark.parametrize(("before", "now"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_the_other_optimiser_is_refused_by_name(before: Name, now: Name, tmp_path: Path) -> None:
    found = saved(tmp_path, trained(0, before, 2)[1])
    with pytest.raises(
        UserError, match=f"trained with optim.name {before}, .* nothing to {now}; set --optim.name {before}"
    ):
        trained(0, now, 1)[1].restore(found)


def test_groups_that_are_not_divided_are_no_groups_for_muon() -> None:
    with pytest.raises(ValueError, match="divide_groups"):
        build_optimizer(parameter_groups(classifier(), 0.05), OptimSettings(name="muon"), CPU)
