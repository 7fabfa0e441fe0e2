"""What is not finite never reaches the weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from mae.training.guard import nan_gradients_if_nonfinite, step_unless, step_unless_on_device


@pytest.mark.parametrize("value", [0.0, 1.5, -1e38])
def test_a_finite_loss_keeps_its_bits_and_its_gradients_n01(value: float) -> None:
    weight = torch.tensor([0.3, value], requires_grad=True)
    loss = (weight * 2).sum()
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(nan_gradients_if_nonfinite(loss), loss)
    (found,) = torch.autograd.grad(nan_gradients_if_nonfinite(loss), weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_any_other_loss_spoils_every_gradient_n01(value: float) -> None:
    """Even one whose own gradient is finite: the square of 1e30 is not, its derivative is."""
    weights = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(nan_gradients_if_nonfinite(weights.sum() + value), weights)
    assert found.isnan().all()


@pytest.mark.parametrize("taking", [step_unless, step_unless_on_device], ids=["host", "device"])
def test_a_skipped_step_changes_neither_weights_nor_optimiser_n01(
    taking: Callable[[torch.optim.Optimizer, torch.Tensor], None],
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)

    def step(scale: float) -> None:
        (model(torch.ones(2, 4)).sum() * scale).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        taking(optimizer, ~norm.isfinite())
        optimizer.zero_grad()

    def everything() -> list[torch.Tensor]:
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        return [p.detach().clone() for p in model.parameters()] + moments

    step(1.0)
    before = everything()
    step(math.nan)
    assert all(map(torch.equal, before, everything()))
    step(1.0)
    assert not any(map(torch.equal, before, everything()))
