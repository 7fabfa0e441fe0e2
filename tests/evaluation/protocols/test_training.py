"""Protocols that train: the same batches on any number of processes, and only what is named is trained."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mae.data.images.augment import AugmentSettings
from mae.data.indexing import open_index
from mae.data.loader import load, normalize
from mae.data.settings import DataSettings
from mae.data.source import statistics_of
from mae.errors import UserError
from mae.evaluation.protocols import attentive, linear_paper, partial, resnet, training, tuned
from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, Samples, TrainingRules
from mae.models.description import describe_model
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.tasks.classification_loss import ClassificationLoss, RegularizationSettings
from mae.training.optimizer import set_learning_rate

CLASSES = 4
SETTINGS = EncoderSettings(width=16, depth=3, heads=2, patch_size=(4,))
DATA = DataSettings(image_size=(8,), channels=1, mean=(0.5,), std=(0.3,), crop_pct=1.0, workers=0)
DESCRIPTION = describe_model("classifier", SETTINGS, (8, 8), (0.5,), (0.3,), 1.0)
AUGMENT = AugmentSettings(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25)
RULES = TrainingRules(1.0, 16, AUGMENT, RegularizationSettings())


PLAIN_RECIPE = Recipe(nn.Module, linear_paper.lars, (1.0,), 0.0, AUGMENT)


@pytest.fixture
def samples(make_shards: Callable[..., Path], tmp_path: Path) -> Samples:
    index = open_index([str(make_shards([30, 10]))], tmp_path / "cache")
    return Samples(index, np.arange(1, 40), DATA, CLASSES)


@pytest.fixture
def start() -> Start:
    torch.manual_seed(3)
    return Start(DESCRIPTION, build_encoder(SETTINGS, (8, 8), 1).state_dict())


class OneOfSeveral(Accelerator):  # type: ignore[misc]
    """Accelerator of one of several processes, without the exchange of gradients."""

    def __init__(self, processes: int, rank: int) -> None:
        self._processes, self._rank = processes, rank
        super().__init__(cpu=True)

    @property
    def num_processes(self) -> int:
        return self._processes

    @property
    def process_index(self) -> int:
        return self._rank

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        loss.backward()


def gradients(recipe: Recipe, samples: Samples, processes: int, rank: int) -> dict[str, torch.Tensor]:
    """The gradients that one process computes of the first global batch."""
    torch.manual_seed(0)
    module = recipe.build()
    plan = training.plan_of(recipe, RULES, processes)
    batches = load(samples.batches(plan, rank, 5, recipe.augment), range(plan.accumulation), 0)
    loss_of = ClassificationLoss(recipe.regularization, CLASSES)
    accelerator, erasing = OneOfSeveral(processes, rank), recipe.augment.erase
    training._Steps(accelerator, module, plan, samples, batches, loss_of, 5, erasing).backward(0)
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("protocol", [attentive, linear_paper, tuned, resnet])
def test_two_processes_have_the_mean_gradient_of_one(
    protocol: Any, start: Start, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mixup, drop path and batch norm, because a micro-batch is the same whoever has it."""
    monkeypatch.setattr(training, "MICRO_BATCH", 8)
    recipe = protocol.recipe(DESCRIPTION if protocol is resnet else start, CLASSES, RULES)
    one = gradients(recipe, samples, 1, 0)
    two = [gradients(recipe, samples, 2, rank) for rank in range(2)]
    assert one.keys() == two[0].keys()
    last = {attentive: "head.2.bias", linear_paper: "head.1.bias", tuned: "head.bias", resnet: "fc.bias"}[protocol]
    assert not torch.allclose(two[0][last], two[1][last])
    for name, gradient in one.items():
        torch.testing.assert_close((two[0][name] + two[1][name]) / 2, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("processes", [2, 4])
def test_each_number_of_processes_sees_the_same_samples(samples: Samples, processes: int) -> None:
    def seen(count: int) -> list[list[int]]:
        plan = training.plan_of(PLAIN_RECIPE, RULES, count)
        ranks = [samples.batches(plan, rank, 5, RULES.augment) for rank in range(count)]
        return [[int(n) for made in ranks for n in made[step].ids] for step in range(5)]

    assert seen(processes) == seen(1)
    assert {number for batch in seen(1) for number in batch} == set(range(1, 40))


@torch.no_grad()
def test_efficient_probing_equals_a_slow_formula() -> None:
    probe, tokens = attentive.EfficientProbe(6, 3).double(), torch.randn(2, 5, 6, dtype=torch.double)
    found = probe(tokens)
    for image in range(2):
        for query in range(3):
            scores = [float(probe.queries[query] @ token) / 6**0.5 for token in tokens[image]]
            total = sum(np.exp(scores))
            for channel in range(2 * query, 2 * query + 2):
                values = [float(probe.value.weight[channel] @ token) for token in tokens[image]]
                expected = sum(np.exp(s) / total * v for s, v in zip(scores, values, strict=True))
                assert found[image, channel].item() == pytest.approx(expected, rel=1e-9)


def test_the_attentive_probe_sees_raw_patches_and_leaves_the_encoder_alone(start: Start, samples: Samples) -> None:
    recipe = attentive.recipe(start, CLASSES, RULES)
    assert recipe.about["queries"] == 16
    module = training.train(recipe, 1e-3, samples, RULES, 0, Accelerator(cpu=True), "")
    assert start.weights is not None
    for name, tensor in module.encoder.state_dict().items():
        assert torch.equal(tensor, start.weights[name]), name
    images = torch.randn(2, 1, 8, 8)
    encoder = module.encoder.eval()
    tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    for block in encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(module.eval()(images), module.head(tokens[:, 1:]))


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        ("0", ("head.",)),
        ("1/2", ("head.", "norm.", "blocks.2.norm2.", "blocks.2.mlp.")),
        ("1", ("head.", "norm.", "blocks.2.")),
        ("2", ("head.", "norm.", "blocks.1.", "blocks.2.")),
    ],
)
def test_partial_fine_tuning_moves_exactly_the_named_tensors(
    start: Start, samples: Samples, blocks: str, trained: tuple[str, ...]
) -> None:
    recipes = partial.recipes(start, CLASSES, RULES)
    assert list(recipes) == ["partial 0", "partial 1/2", "partial 1", "partial 2"]
    recipe = recipes[f"partial {blocks}"]
    torch.manual_seed(0)
    before = recipe.build().state_dict()
    after = training.train(recipe, 1.0, samples, RULES, 0, Accelerator(cpu=True), "").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(trained)}


def test_lars_is_the_published_formula() -> None:
    """Steps of a matrix are scaled by 0.001 |weights| / |gradient|; those of a bias are not."""
    layer = nn.Linear(5, 3)
    weights, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = linear_paper.lars(layer)
    set_learning_rate(optimizer, 2.0)
    averages = [torch.zeros(3, 5), torch.zeros(3)]
    for _ in range(3):
        gradients = [torch.randn(3, 5), torch.randn(3)]
        layer.weight.grad, layer.bias.grad = (gradient.clone() for gradient in gradients)
        optimizer.step()
        steps = [gradients[0] * 1e-3 * weights.norm() / gradients[0].norm(), gradients[1]]
        averages = [0.9 * average + step for average, step in zip(averages, steps, strict=True)]
        weights, bias = weights - 2.0 * averages[0], bias - 2.0 * averages[1]
        torch.testing.assert_close(layer.weight.detach(), weights)
        torch.testing.assert_close(layer.bias.detach(), bias)


def test_the_published_linear_probe_sees_the_normed_cls_token(start: Start) -> None:
    module = linear_paper.recipe(start, CLASSES, RULES).build().eval()
    images = torch.randn(2, 1, 8, 8)
    encoder = start.frozen_encoder().eval()
    torch.testing.assert_close(module(images), module.head(encoder(images)))
    norm, linear = module.head
    assert (norm.affine, norm.eps) == (False, 1e-6)
    assert (linear.in_features, linear.out_features) == (16, CLASSES)


@pytest.mark.parametrize(("size", "cells"), [((8, 8), 64), ((64, 64), 16 * 16)])
def test_a_residual_network_keeps_the_resolution_of_small_images(size: tuple[int, int], cells: int) -> None:
    module = resnet.recipe(replace(DESCRIPTION, image_size=size), 3, RULES).build().eval()
    images = torch.randn(2, 1, *size)
    stem = module.maxpool(module.act1(module.bn1(module.conv1(images))))
    assert stem.flatten(2).shape == (2, 64, cells)
    assert module(images).shape == (2, 3)


def test_statistics_of_batch_norms_are_those_of_the_training_images(start: Start, samples: Samples) -> None:
    """Whatever the number of steps; a running average would still remember how it started."""
    recipe = linear_paper.recipe(start, CLASSES, RULES)
    module = training.train(recipe, 1e-3, samples, RULES, 0, Accelerator(cpu=True), "")
    plan = training.plan_of(recipe, RULES, 1)
    batches = load(samples.batches(plan, 0, 0, recipe.augment), range(3), 0)
    with torch.no_grad():
        features = [module.encoder.eval()(normalize(batch.images, statistics_of(DATA))) for batch in batches]
    norm = module.head[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([f.mean(dim=0) for f in features]).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.stack([f.var(dim=0) for f in features]).mean(dim=0))


def test_a_batch_norm_needs_two_images_and_mixing_an_even_number(start: Start) -> None:
    odd, one = replace(RULES, batch_size=7), replace(RULES, batch_size=2)
    assert training.plan_of(attentive.recipe(start, CLASSES, odd), odd, 1).per_process == 7  # it never mixes
    with pytest.raises(UserError, match="a process takes 7 at a time"):
        training.plan_of(tuned.recipe(start, CLASSES, odd), odd, 1)
    with pytest.raises(UserError, match=r"at least 2 images, but a process takes 1 at a time; choose .* at least 4"):
        training.plan_of(attentive.recipe(start, CLASSES, one), one, 2)


def test_only_random_weights_are_trained_without_layer_decay(start: Start) -> None:
    for begun, scales in ((start, 5), (Start(DESCRIPTION), 1)):
        recipe = tuned.recipe(begun, CLASSES, RULES)
        assert len({group["lr_scale"] for group in recipe.optimizer(recipe.build()).param_groups}) == scales
