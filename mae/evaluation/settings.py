"""Settings of an evaluation, and the labelled sets that they name."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tyro.conf import Positional

from mae.data.labelled_sets import OverlapLimit, agreed_names, count_classes, limit_overlap, require_two_classes
from mae.data.prepare import open_shards
from mae.evaluation.feature_set import KINDS
from mae.evaluation.judging import JudgingRules, LabelledSets, Protocol
from mae.evaluation.protocols.outcome import require_held_out
from mae.evaluation.protocols.training import TrainingRules
from mae.inference.settings import ReadSettings
from mae.models.description import ModelDescription
from mae.models.readout import NormKind
from mae.models.vit import TokenKind
from mae.settings import check
from mae.tasks.classification_loss import RegularizationSettings
from mae.tasks.finetune_settings import FinetuneAugmentSettings


@dataclass(frozen=True)
class SampleSettings(ReadSettings):
    """Labelled samples to fit on, and how they are read. Size and normalisation are those of each model."""

    shards: tuple[str, ...] = ()
    """Labelled tar shards to fit on: paths, globs, braces, folders or URLs."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Judge encoders by labelled samples. Features are computed once, and kept in the cache.

    Whatever can be chosen (tokens, norm, k, C, learning rate) is chosen on a tenth of the training samples; the test
    samples are used once. Of a fine-tuning run, the best model is judged, with its head too.
    """

    EXAMPLE: ClassVar = "mae evaluate runs/first --data.shards 'train-*.tar' --eval_shards 'test-*.tar'"
    FIRST: ClassVar = ("data.shards", "eval_shards", "protocols", "seeds", "out")

    source: Positional[tuple[Path, ...]]
    """Folders of finished runs, checkpoint folders, exports, or model files; folders or files of timm, transformers,
    torchvision or the original MAE code; hub:OWNER/NAME; timm:NAME."""
    data: SampleSettings = field(default_factory=SampleSettings)
    eval_shards: tuple[str, ...] = ()
    """Labelled tar shards to measure on."""
    protocols: tuple[Protocol, ...] = ("knn", "linear", "pixels", "untrained")
    """knn: nearest neighbours; linear: logistic regression; few_shot: logistic regression on a few samples of each
    class. With pixels, the same and an RBF SVM on the pixels; with untrained, the same on an encoder of the same shape
    with random weights. The others train on augmented images, once for each of three to six learning rates and once
    more with the best. attentive: learned queries attend to frozen patch tokens; linear_paper: the published linear
    probe; partial: the last 0, 1/2, 1, 2, 4, ... blocks; finetune: the whole encoder; scratch: the same from random
    weights; resnet: a ResNet-18 from random weights."""
    seeds: int = 1
    """Number of times that each protocol is repeated, with other held-out samples, few samples and random weights."""
    tokens: TokenKind | Literal["choose"] = "choose"
    """Tokens to read: cls, the mean of the patches (avg), or both; choose: the best on held-out training samples."""
    norm: NormKind | Literal["choose"] = "choose"
    """Tokens before (raw) or after (normed) the encoder's last norm; choose: the best on held-out training samples."""
    shots: int = 10
    """Samples of each class for few_shot."""
    splits: int = 5
    """Number of choices of these samples for each seed."""
    epochs: float = 30.0
    """Epochs of protocols that train: of each of three to six learning rates, and once more of the best."""
    batch_size: int = 256
    """Global batch [images per optimiser step] of protocols that train, over all processes."""
    augment: FinetuneAugmentSettings = field(default_factory=FinetuneAugmentSettings)
    regularization: RegularizationSettings = field(default_factory=RegularizationSettings)
    eval_overlap: float = 0.01
    """Largest share of the test samples that may also be training samples; such samples are counted and named."""
    out: Path | None = None
    """Folder for results.json, results.md and results.html; None: `evaluation` beside the first model."""

    def __post_init__(self) -> None:
        check(len(self.source) > 0, "source", "none given", "at least one run or model file")
        for name, value in (("data.shards", self.data.shards), ("eval_shards", self.eval_shards)):
            check(len(value) > 0, name, "none given", "labelled shards")
        check(len(self.protocols) > 0, "protocols", "none given", "at least one")
        check(0 < self.epochs < math.inf, "epochs", self.epochs, "above 0")
        for name in ("seeds", "shots", "splits", "batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(0 <= self.eval_overlap <= 1, "eval_overlap", self.eval_overlap, "from 0 to 1")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of features to choose from."""
        wanted = [kind for kind in KINDS if self.tokens in ("choose", kind.split()[0])]
        return tuple(kind for kind in wanted if self.norm in ("choose", kind.split()[1]))

    def rules(self, device: torch.device) -> JudgingRules:
        """Return the rules of all protocols."""
        training = TrainingRules(self.epochs, self.batch_size, self.augment, self.regularization)
        return JudgingRules(self.protocols, self.kinds, self.seeds, self.shots, self.splits, device, training)


def open_sets(settings: EvaluateSettings, model: ModelDescription, say: Callable[[str], None]) -> LabelledSets:
    """Open the training and the test samples, and compare them with each other.

    Raises:
        UserError: if shards are missing or damaged, labels do not fit, no sample can be held out to choose by, or
            too many samples are in both sets.
    """
    data = settings.data.as_seen_by(model)
    train, test = open_shards(settings.data.shards, data, say), open_shards(settings.eval_shards, data, say)
    names = agreed_names(train, test, say)
    classes = count_classes(train, test, names)
    require_two_classes(train.label, "data.shards")
    if set(settings.protocols) != {"untrained"}:  # which alone judges heads only, and chooses nothing
        require_held_out(train.label, "data.shards")
    limit_overlap(train, test, OverlapLimit(settings.eval_overlap), data, say)
    return LabelledSets(train, test, classes, names)
