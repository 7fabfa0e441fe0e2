"""Protocols that train: the same batches on any number of processes, and only what is named is trained."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mae.data.images.augment import AugmentSettings
from mae.data.indexing import open_index
from mae.data.loader import load
from mae.data.settings import DataSettings
from mae.errors import UserError
from mae.evaluation.protocols import attentive, training, tuned
from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, Samples, TrainingRules
from mae.models.description import ModelDescription, describe_model
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.tasks.classification_loss import ClassificationLoss, RegularizationSettings

CLASSES = 4
SETTINGS = EncoderSettings(width=16, depth=3, heads=2, patch_size=(4,))
DATA = DataSettings(image_size=(8,), channels=1, mean=(0.5,), std=(0.3,), crop_pct=1.0, workers=0)
DESCRIPTION = describe_model("classifier", SETTINGS, (8, 8), (0.5,), (0.3,), 1.0)
RULES = TrainingRules(1, 16, AugmentSettings(rand_augment=9), RegularizationSettings())


@pytest.fixture
def samples(make_shards: Callable[..., Path], tmp_path: Path) -> Samples:
    index = open_index([str(make_shards([30, 10]))], tmp_path / "cache")
    return Samples(index, np.arange(1, 40), DATA, CLASSES)


@pytest.fixture
def start() -> Start:
    torch.manual_seed(3)
    return Start(DESCRIPTION, build_encoder(SETTINGS, (8, 8), 1).state_dict())


def rank_of(processes: int, rank: int) -> Any:
    """Stands for the accelerator of one of several processes, without the exchange of gradients."""
    return SimpleNamespace(
        process_index=rank,
        num_processes=processes,
        device=torch.device("cpu"),
        no_sync=lambda module: nullcontext(),
        backward=lambda loss: loss.backward(),
    )


def gradients(recipe: Recipe, samples: Samples, processes: int, rank: int) -> dict[str, torch.Tensor]:
    """The gradients that one process computes of the first global batch."""
    torch.manual_seed(0)
    module = recipe.build()
    plan = training.plan_of(RULES, processes)
    batches = load(samples.batches(plan, rank, 5, recipe.augment), range(plan.accumulation), 0)
    loss_of = ClassificationLoss(recipe.regularization, CLASSES)
    training._Steps(rank_of(processes, rank), module, plan, samples, batches, loss_of, 5).backward(0)
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("protocol", [attentive, tuned])
def test_two_processes_have_the_mean_gradient_of_one(
    protocol: Any, start: Start, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mixup, drop path and batch norm, because a micro-batch is the same whoever has it."""
    monkeypatch.setattr(training, "MICRO_BATCH", 8)
    recipe = protocol.recipe(start, CLASSES, RULES)
    one = gradients(recipe, samples, 1, 0)
    two = [gradients(recipe, samples, 2, rank) for rank in range(2)]
    assert one.keys() == two[0].keys()
    assert not torch.allclose(two[0]["head.bias" if protocol is tuned else "head.2.bias"], two[1]["head.bias" if protocol is tuned else "head.2.bias"])
    for name, gradient in one.items():
        torch.testing.assert_close((two[0][name] + two[1][name]) / 2, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("processes", [2, 4])
def test_each_number_of_processes_sees_the_same_samples(samples: Samples, processes: int) -> None:
    def seen(count: int) -> list[list[int]]:
        plan = training.plan_of(RULES, count)
        ranks = [samples.batches(plan, rank, 5, RULES.augment) for rank in range(count)]
        return [[int(n) for made in ranks for n in made[step].ids] for step in range(5)]

    assert seen(processes) == seen(1)
    assert set(sum(seen(1), [])) == set(range(1, 40))


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
