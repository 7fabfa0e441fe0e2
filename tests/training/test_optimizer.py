import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import Optimizer

from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.training.optimizer import (
    CosineSchedule,
    OptimSettings,
    build_optimizer,
    cosine_schedule,
    describe_groups,
    parameter_groups,
    set_learning_rate,
)

DEPTH = 3
CPU = torch.device("cpu")


def classifier() -> VisionTransformer:
    torch.manual_seed(0)
    settings = EncoderSettings(width=8, depth=DEPTH, heads=2, patch_size=(4,))
    return build_classifier(settings, (8, 8), 3, 5, "mlp")


def autoencoder() -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings = MaskedAutoencoderSettings(
        width=8, depth=DEPTH, heads=2, patch_size=(4,), decoder_width=8, decoder_depth=2, decoder_heads=2
    )
    return MaskedAutoencoder(settings, (8, 8), 3)


def slow_scale(name: str, layer_decay: float) -> float:
    """Multiply by `layer_decay` once for each layer between a parameter and the top."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = DEPTH + 1
    scale = 1.0
    for _ in range(DEPTH + 1 - layer):
        scale *= layer_decay
    return scale


def of_each_parameter(model: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Name of a parameter -> a value of its group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


def optimizer_of(model: nn.Module, layer_decay: float, **optim: Any) -> Optimizer:
    groups = parameter_groups(model, optim.get("weight_decay", 0.05), layer_decay)
    return build_optimizer(groups, OptimSettings(**optim), CPU)


@pytest.mark.parametrize("build", [classifier, autoencoder])
@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_each_trainable_parameter_is_in_exactly_one_group(build: Any, layer_decay: float) -> None:
    model = build()
    grouped = [id(p) for group in parameter_groups(model, 0.05, layer_decay) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_frozen_positions_are_in_no_group_and_learned_ones_are() -> None:
    model = autoencoder()
    names = of_each_parameter(model, parameter_groups(model, 0.05), "name")
    assert not [name for name in names if "pos_embed" in name]
    model = classifier()
    assert "pos_embed" in of_each_parameter(model, parameter_groups(model, 0.05), "name")


@pytest.mark.parametrize("build", [classifier, autoencoder])
@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_only_weights_of_linear_layers_and_the_patch_embedding_decay(build: Any, layer_decay: float) -> None:
    model = build()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    decays = of_each_parameter(model, parameter_groups(model, 0.3, layer_decay), "weight_decay")
    expected = {name: 0.3 if name in {f"{layer}.weight" for layer in layers} else 0.0 for name in decays}
    assert decays == expected


@pytest.mark.parametrize("layer_decay", [0.5, 0.75])
def test_the_optimiser_holds_the_rate_of_the_formula(layer_decay: float) -> None:
    model = classifier()
    optimizer = optimizer_of(model, layer_decay)
    for lr in (3e-3, 1e-4):
        set_learning_rate(optimizer, lr)
        rates = of_each_parameter(model, optimizer.param_groups, "lr")
        assert rates == pytest.approx({name: lr * slow_scale(name, layer_decay) for name in rates})
    assert len(set(rates.values())) == DEPTH + 2


def test_without_layer_decay_all_learn_at_one_rate() -> None:
    optimizer = optimizer_of(autoencoder(), 1.0)
    set_learning_rate(optimizer, 2e-3)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("all, no decay", 2e-3),
        ("all", 2e-3),
    ]


@pytest.mark.parametrize("layer_decay", [0.5, 0.75])
def test_stem_blocks_and_head_have_timms_scales(layer_decay: float) -> None:
    model = classifier()
    timms = param_groups_layer_decay(model, layer_decay=layer_decay, no_weight_decay_list=model.no_weight_decay())
    theirs = of_each_parameter(model, timms, "lr_scale")
    ours = of_each_parameter(model, parameter_groups(model, 0.05, layer_decay), "lr_scale")
    assert set(ours) == set(theirs)
    # timm counts the final norm to the last block; the published fine-tuning, and we, to the head.
    norm = {"norm.weight", "norm.bias"}
    assert {n: s for n, s in ours.items() if n not in norm} == pytest.approx(
        {n: s for n, s in theirs.items() if n not in norm}
    )
    assert {ours[name] for name in norm} == {1.0}
    assert of_each_parameter(model, timms, "weight_decay") == of_each_parameter(
        model, parameter_groups(model, 0.05, layer_decay), "weight_decay"
    )


def test_an_autoencoders_encoder_has_the_scales_of_a_vit() -> None:
    model = autoencoder()
    scales = of_each_parameter(model, parameter_groups(model, 0.05, 0.5), "lr_scale")
    expected = {
        name: slow_scale(name.removeprefix("encoder."), 0.5) if name.startswith("encoder.") else 1.0 for name in scales
    }
    assert scales == pytest.approx(expected)


def test_one_step_moves_each_layer_by_its_own_rate() -> None:
    model = classifier()
    optimizer = optimizer_of(model, 0.5, weight_decay=0.0)
    set_learning_rate(optimizer, 1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # AdamW's first step has the length of the learning rate, whatever the gradient's.
        expected = 1e-2 * slow_scale(name, 0.5)
        moved = (parameter - before[name]).abs()
        assert moved.median().item() == pytest.approx(expected, rel=1e-2), name


def test_weight_decay_shrinks_weights_and_leaves_norms_alone() -> None:
    model = classifier()
    optimizer = optimizer_of(model, 1.0, weight_decay=0.1)
    set_learning_rate(optimizer, 0.5)
    weight, norm = model.blocks[0].mlp.fc1.weight, model.norm.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.5 * 0.1))
    assert (norm == 1).all()


def test_the_optimiser_is_fused_and_has_the_settings_betas() -> None:
    optimizer = optimizer_of(classifier(), 1.0, betas=(0.8, 0.9))
    assert optimizer.defaults["fused"]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_before_its_first_learning_rate_the_optimiser_moves_nothing() -> None:
    model = classifier()
    optimizer = optimizer_of(model, 0.5)
    before = model.norm.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(model.norm.bias, before)


def test_groups_are_described_by_the_rates_the_optimiser_is_given() -> None:
    model = classifier()
    groups = parameter_groups(model, 0.05, 0.5)
    lines = describe_groups(groups, 4e-3)
    optimizer = build_optimizer(groups, OptimSettings(), CPU)
    set_learning_rate(optimizer, 4e-3)
    assert len(lines) == len(optimizer.param_groups) == 2 * (DEPTH + 2)
    counted = 0
    for line, group in zip(lines, optimizer.param_groups, strict=True):
        found = re.fullmatch(r"  (.+?) +peak lr (\S+)  decay (\S+)  ([\d,]+) parameters", line)
        assert found
        assert found[1] == group["name"]
        assert float(found[2]) == pytest.approx(group["lr"], rel=1e-3)
        assert float(found[3]) == group["weight_decay"]
        counted += int(found[4].replace(",", ""))
    assert counted == sum(p.numel() for p in model.parameters())
    assert len({line.index("peak lr") for line in lines}) == 1
    assert {group["name"].removesuffix(", no decay") for group in groups} == {
        "stem",
        "block 0",
        "block 1",
        "block 2",
        "norm and head",
    }


def test_the_peak_grows_with_the_batch() -> None:
    assert OptimSettings(base_lr=1e-3).peak_lr(256) == 1e-3
    # The paper's pretraining: base 1.5e-4, 4096 images a step.
    assert OptimSettings().peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimSettings(base_lr=1e-3).peak_lr(64) == pytest.approx(2.5e-4)


def slow_rate(schedule: CosineSchedule, step: int) -> float:
    if step < schedule.warmup_steps:
        return schedule.peak * step / schedule.warmup_steps
    share = (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
    return schedule.floor + 0.5 * (schedule.peak - schedule.floor) * (1 + math.cos(math.pi * share))


@settings(max_examples=50, deadline=None)
@given(
    peak=st.floats(1e-5, 1.0),
    floor_share=st.floats(0.0, 1.0),
    warmup=st.integers(0, 40) | st.floats(0.5, 40.0),
    rest=st.integers(2, 200),
)
def test_the_schedule_is_a_ramp_and_half_a_cosine(peak: float, floor_share: float, warmup: float, rest: int) -> None:
    total = math.ceil(warmup) + rest
    schedule = CosineSchedule(peak, floor_share * peak, float(warmup), total)
    rates = [schedule(step) for step in range(total + 1)]
    assert rates == pytest.approx([slow_rate(schedule, step) for step in range(total + 1)])
    assert rates[0] == (0.0 if warmup > 0 else pytest.approx(peak))
    assert rates[-1] == pytest.approx(schedule.floor, abs=1e-12)
    assert max(rates) <= peak * (1 + 1e-12)
    assert rates[round(warmup)] == pytest.approx(peak) or warmup != round(warmup)
    # No jump: never more in a step than the steepest part of the ramp and of the cosine together.
    steepest = peak / max(warmup, 1.0) + math.pi / 2 * peak / (total - warmup)
    ramp_and_cosine = rates if warmup >= 1 else rates[1:]
    for earlier, later in pairwise(ramp_and_cosine):
        assert abs(later - earlier) <= steepest * (1 + 1e-9)


def test_a_schedule_counts_its_warm_up_in_steps_of_the_run() -> None:
    optim = OptimSettings(base_lr=1e-3, min_lr=1e-5, warmup_epochs=2.5)
    schedule = cosine_schedule(optim, batch_size=512, epochs=10.0, steps_per_epoch=100.0, total_steps=1000)
    assert schedule(0) == 0
    assert schedule(125) == pytest.approx(1e-3)
    assert schedule(250) == pytest.approx(2e-3)
    assert schedule(625) == pytest.approx((2e-3 + 1e-5) / 2)
    assert schedule(1000) == pytest.approx(1e-5)


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    for warmup_epochs in (10.0, 11.0):
        with pytest.raises(UserError, match=r"optim\.warmup_epochs is .* less than epochs = 10"):
            cosine_schedule(OptimSettings(warmup_epochs=warmup_epochs), 256, 10.0, 5.0, 50)


def test_an_end_above_the_peak_is_refused() -> None:
    optim = OptimSettings(base_lr=1e-3, min_lr=1e-3, warmup_epochs=1.0)
    with pytest.raises(UserError, match=r"optim\.min_lr is 0\.001; allowed: at most the peak .* 0\.0005"):
        cosine_schedule(optim, 128, 10.0, 5.0, 50)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("base_lr", value) for value in (0.0, -1e-3, math.nan, math.inf)],
        *[("min_lr", value) for value in (-1e-9, math.nan, math.inf)],
        *[("warmup_epochs", value) for value in (-1.0, math.nan, math.inf)],
        *[("weight_decay", value) for value in (-0.1, math.nan, math.inf)],
        *[("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9))],
        *[("clip_grad", value) for value in (0.0, -1.0, math.nan)],
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^optim\.{name} is .*; allowed: "):
        OptimSettings(**{name: value})
