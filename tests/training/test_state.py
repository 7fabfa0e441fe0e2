"""All that a run has learned comes back from a checkpoint, field by field."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from mae.errors import UserError
from mae.training.checkpoints.manifest import DataPosition, RunPosition
from mae.training.checkpoints.reader import newest_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.ema import WeightAverage
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups
from mae.training.state import TrainingState, final_weights

RUN_POSITION = RunPosition(
    7, DataPosition(56, "f", 8), {"seed": 1}, {"pipeline": {"best": {"step": 3, "accuracy": 0.5}}}
)


def trained(seed: int, decay: float | None, width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, TrainingState]:
    """A model of two layers, one of them frozen, after three steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 3), nn.LayerNorm(3), nn.Linear(3, 2).requires_grad_(False))
    groups = parameter_groups(model, 0.05)
    prepared, optimizer = Accelerator(cpu=True).prepare(
        model, build_optimizer(groups, OptimSettings(), torch.device("cpu"))
    )
    state = TrainingState(prepared, optimizer, decay)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in range(1, 4):
        prepared(torch.rand(5, width)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state.update_average(step)
    return prepared, optimizer, state


def save(root: Path, state: TrainingState) -> None:
    writer = CheckpointWriter(root, keep=1)
    writer.save(state.tensors(), {"format": "pt"}, RUN_POSITION)
    writer.wait()
    writer.close()


@pytest.mark.parametrize("decay", [None, 0.9])
def test_weights_moments_steps_average_position_and_notes_come_back_c15(decay: float | None, tmp_path: Path) -> None:
    _, _, before = trained(0, decay)
    save(tmp_path, before)
    _, optimizer, after = trained(1, decay)
    found = newest_checkpoint(tmp_path, lambda text: None)
    assert found is not None
    after.restore(found)
    assert found.run_position == RUN_POSITION
    expected, now = before.tensors(), after.tensors()
    assert expected.keys() == now.keys() == {"model", "optimizer"} | ({"ema"} if decay else set())
    for group in expected:
        assert expected[group].keys() == now[group].keys()
        assert all(torch.equal(expected[group][name], now[group][name]) for name in expected[group])
    assert {group["name"] for group in optimizer.param_groups} == {"all", "all, no decay"}


def test_a_run_without_an_average_can_begin_one_c15(tmp_path: Path) -> None:
    _, _, before = trained(0, None)
    save(tmp_path, before)
    _, _, after = trained(1, 0.9)
    found = newest_checkpoint(tmp_path, lambda text: None)
    assert found is not None
    after.restore(found)
    trainable = after.tensors()["ema"]
    assert all(torch.equal(average, before.tensors()["model"][name]) for name, average in trainable.items())


def test_other_frozen_weights_are_refused_as_such_c09(tmp_path: Path) -> None:
    _, _, before = trained(0, None)
    save(tmp_path, before)
    model, optimizer, _ = trained(1, None)
    model[2].requires_grad_(True)
    after = TrainingState(model, optimizer, None)
    found = newest_checkpoint(tmp_path, lambda text: None)
    assert found is not None
    with pytest.raises(UserError, match=r"another freeze: 4 tensors were trained, now 6, .* is 2\.bias; set freeze"):
        after.restore(found)


def test_another_model_is_refused_by_name_c09(tmp_path: Path) -> None:
    _, _, before = trained(0, None)
    save(tmp_path, before)
    _, _, wider = trained(0, None, width=5)
    found = newest_checkpoint(tmp_path, lambda text: None)
    assert found is not None
    with pytest.raises(UserError, match=r"another model .*0\.weight is \[3, 4\] instead of \[3, 5\]"):
        wider.restore(found)


def test_the_average_is_shown_and_published_and_the_weights_stay(tmp_path: Path) -> None:
    model, _, state = trained(0, 0.9)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = state.tensors()["ema"]
    with state.evaluation_weights() as shown:
        assert all(torch.equal(p, average[name]) for name, p in shown.named_parameters() if p.requires_grad)
        assert not torch.equal(shown.state_dict()["0.weight"], weights["0.weight"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    save(tmp_path, state)
    found = newest_checkpoint(tmp_path, lambda text: None)
    assert found is not None
    final = final_weights(found)
    assert all(torch.equal(final[name], average.get(name, weights[name])) for name in weights)


def test_the_average_follows_its_formula() -> None:
    weight = torch.tensor([1.0, 2.0])
    average = WeightAverage({"w": weight}, 0.75)
    expected = weight.clone()
    for step in range(1, 5):
        weight += 1
        average.update(step)
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(average.tensors["w"], expected)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_a_warm_up_has_the_decays_and_the_averages_of_timm(decay: float) -> None:
    model = nn.Linear(3, 2)
    timms = ModelEmaV3(model, decay=decay, use_warmup=True)
    average = WeightAverage(dict(model.named_parameters()), decay, warmup=True)
    for step in range(1, 60):
        with torch.no_grad():
            model.weight.normal_()
            model.bias.normal_()
        timms.update(model, step=step)
        average.update(step)
        assert average.decay_at(step) == pytest.approx(timms.get_decay(step), abs=1e-12)
        assert average.decay_at(step) <= decay
        for name, weight in timms.module.named_parameters():
            torch.testing.assert_close(average.tensors[name], weight)
    assert average.decay_at(1) == 0


def test_a_weight_that_is_not_finite_is_seen_n03() -> None:
    model, _, state = trained(0, None)
    assert state.are_finite()
    with torch.no_grad():
        model[0].weight[1, 2] = float("inf")  # type: ignore[index]
    assert not state.are_finite()
