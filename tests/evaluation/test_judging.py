"""What is judged beside several models: nothing twice, and nothing under the name of another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae.data.index import ShardIndex
from mae.evaluation.feature_set import KINDS
from mae.evaluation.judging import JudgingRules, LabelledSets, Protocol, subjects
from mae.evaluation.naming import distinct_names
from mae.evaluation.protocols.training import TrainingRules
from mae.evaluation.trained import trainees
from mae.inference.model import Model
from mae.models.description import ModelDescription, describe_model
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.tasks.classification_loss import RegularizationSettings
from mae.tasks.finetune_settings import FinetuneAugmentSettings

SETTINGS = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
PLAIN = describe_model("classifier", SETTINGS, (8, 8), (0.5,), (0.3,), 1.0)
WIDE = replace(PLAIN, width=32)
BRIGHT = replace(PLAIN, mean=(0.7,))
UNREAD = object.__new__(ShardIndex)  # only names are looked at
SETS = LabelledSets(UNREAD, UNREAD, 2, ("a", "b"))


def rules(*protocols: Protocol) -> JudgingRules:
    training = TrainingRules(1.0, 4, FinetuneAugmentSettings(), RegularizationSettings())
    return JudgingRules(protocols, KINDS, 1, 10, 5, torch.device("cpu"), training)


def models(*descriptions: ModelDescription) -> dict[str, Model]:
    def model(description: ModelDescription) -> Model:
        encoder = build_encoder(description.encoder(), description.image_size, description.channels)
        return Model(Path("run"), description, None, encoder, torch.device("cpu"))

    return {f"run {number}": model(description) for number, description in enumerate(descriptions)}


@pytest.fixture(autouse=True)
def _without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "sha256", "0")


def names(*descriptions: ModelDescription) -> list[str]:
    """Names of what is judged beside the models."""
    found = subjects(models(*descriptions), SETS, rules("knn", "pixels", "untrained"))
    return [subject.name for subject in found if not subject.name.startswith("run")]


def test_what_is_the_same_of_several_models_is_judged_once() -> None:
    assert names(PLAIN) == ["untrained 16x2/4", "pixels 8x8"]
    assert names(PLAIN, replace(PLAIN, pool="avg")) == ["untrained 16x2/4", "pixels 8x8"]
    assert names(PLAIN, WIDE) == ["untrained 16x2/4", "pixels 8x8", "untrained 32x2/4"]


def test_what_differs_is_in_the_names() -> None:
    assert names(PLAIN, BRIGHT) == ["untrained 16x2/4 (mean 0.5)", "pixels 8x8", "untrained 16x2/4 (mean 0.7)"]
    assert names(replace(PLAIN, image_size=(64, 64)), replace(PLAIN, image_size=(96, 96), crop_pct=0.9)) == [
        "untrained 16x2/4 (image_size 64, crop_pct 1.0)",
        "pixels 32x32 (image_size 64, crop_pct 1.0)",
        "untrained 16x2/4 (image_size 96, crop_pct 0.9)",
        "pixels 32x32 (image_size 96, crop_pct 0.9)",
    ]


def test_so_it_is_in_those_of_what_is_trained_from_random_weights() -> None:
    found = trainees(models(PLAIN, WIDE, BRIGHT), SETS, rules("scratch", "resnet"))
    assert [trainee.name for trainee in found] == [
        "untrained 16x2/4 (mean 0.5)",
        "untrained 32x2/4",
        "untrained 16x2/4 (mean 0.7)",
        "resnet18 (mean 0.5)",
        "resnet18 (mean 0.7)",
    ]


def test_a_fact_that_one_of_two_has_is_named() -> None:
    facts = [{"mean": (0.5, 0.4)}, {"mean": (0.5, 0.4), "position_temperature": 10.0}, {"mean": (1,)}]
    assert distinct_names(["a", "a", "b"], facts) == ["a", "a (position_temperature 10.0)", "b"]
