"""The two stages that can be examined, as their pipelines build them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mae.data.batches import Batch, BatchPlan, TrainBatches, labelled_subset
from mae.data.index import ShardIndex
from mae.data.loader import normalize
from mae.data.prepare import open_shards, resolve_statistics, statistics_of, stored_for_stream
from mae.data.settings import DataSettings
from mae.data.stream import StreamBatches
from mae.doctor.examination import Examination, Fact
from mae.doctor.trial import LossOf
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.description import find_model
from mae.models.weights import load_encoder, read_weights
from mae.pipelines import finetune, pretrain
from mae.training.progress import TrainingProgress


@dataclass(frozen=True)
class PretrainDoctorSettings(pretrain.PretrainSettings):  # type: ignore[misc]  # mypy does not follow mae.pipelines
    """Check a pretraining before it is started: `mae doctor` and the words that follow `mae pretrain`.

    `mae doctor finetune` checks a fine-tuning. Exit code 0: start; 2: do not. No run folder is made.
    """

    processes: int | None = None
    """Processes that the run will have, over all machines; None: one per GPU of this machine, or one on CPUs."""


@dataclass(frozen=True)
class FinetuneDoctorSettings(finetune.FinetuneSettings):  # type: ignore[misc]  # mypy does not follow mae.pipelines
    """Check a fine-tuning before it is started: `mae doctor finetune` and the words that follow `mae finetune`.

    Exit code 0: start; 2: do not. No run folder is made.
    """

    processes: int | None = None
    """Processes that the run will have, over all machines; None: one per GPU of this machine, or one on CPUs."""


class Pretraining(Examination):
    """What `pretrain.run` would do up to its first steps."""

    stage, schema, doctor_schema = "pretrain", pretrain.PretrainSettings, PretrainDoctorSettings

    @Fact
    def data(self) -> DataSettings:
        """As the run began with, as set, or as measured."""
        data = self.folder.with_its_statistics(self.settings.data)
        if self.index is None:
            return stored_for_stream(self.shards, data)
        return resolve_statistics(self.index, data, self.say)

    @property
    def samples(self) -> int:
        """Of the index, or those that count as an epoch of a stream."""
        if self.index is not None:
            return len(self.index)
        return int(self.settings.data.stream_samples)

    @property
    def unit(self) -> int:
        """The views of an image stay together."""
        return int(self.settings.data.views_per_image)

    def batches_of(self, plan: BatchPlan) -> TrainBatches | StreamBatches:
        """Images and the noise of their masks."""
        settings = self.settings
        rows, columns = settings.model.grid(self.data.size)
        rest = (plan, 0, settings.seed, self.data, settings.augment, rows * columns)
        return StreamBatches(self.shards, *rest) if self.index is None else TrainBatches(self.index, *rest)

    @Fact
    def model(self) -> nn.Module:
        """Encoder and decoder."""
        torch.manual_seed(self.settings.seed)
        return MaskedAutoencoder(self.settings.model, self.data.size, self.data.channels)

    def loss_of(self, images: int) -> LossOf:
        """Of the hidden patches."""
        statistics = statistics_of(self.data)

        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            loss: Tensor = model(normalize(batch.images, statistics), batch.noise).loss
            return loss

        return loss_of


class Finetuning(Examination):
    """What `finetune.run` would do up to its first steps."""

    stage, schema, doctor_schema = "finetune", finetune.FinetuneSettings, FinetuneDoctorSettings

    @Fact
    def labelled(self) -> ShardIndex:
        """Fine-tuning reads indexed shards only."""
        assert self.index is not None
        return self.index

    @Fact
    def held_out(self) -> ShardIndex | None:
        """The index of the evaluation shards."""
        if not self.settings.eval_shards:
            return None
        # The index that data.index names is that of the training shards.
        return open_shards(self.settings.eval_shards, replace(self.settings.data, index=None), self.say)

    @Fact
    def classes(self) -> int:
        """Of the training shards."""
        return int(finetune.class_count(self.labelled, self.held_out))

    @Fact
    def subset(self) -> NDArray[np.int64] | None:
        """The samples that are trained on; None for all."""
        per_class = self.settings.labels_per_class
        return None if per_class is None else labelled_subset(self.labelled, per_class, self.settings.seed)

    @Fact
    def data(self) -> DataSettings:
        """As the run began with, as set, as in pretraining, or as measured."""
        data = self.folder.with_its_statistics(self.settings.data)
        quiet = TrainingProgress("doctor", enabled=False)
        resolved: DataSettings = finetune.resolve_data(replace(self.settings, data=data), self.labelled, quiet)
        return resolved

    @property
    def samples(self) -> int:
        """Of the subset, or of all."""
        return len(self.labelled) if self.subset is None else len(self.subset)

    @property
    def unit(self) -> int:
        """The views of an image stay together; mixup pairs images."""
        views = int(self.settings.data.views_per_image)
        mixes = self.settings.regularization.mixup > 0 or self.settings.regularization.cutmix > 0
        return views * 2 if mixes and views % 2 else views

    def batches_of(self, plan: BatchPlan) -> TrainBatches | StreamBatches:
        """Images and labels."""
        self.loss_of(plan.per_process)  # mixup refuses an odd number of images
        settings = self.settings
        return TrainBatches(self.labelled, plan, 0, settings.seed, self.data, settings.augment, subset=self.subset)

    @Fact
    def model(self) -> nn.Module:
        """The encoder, with its pretrained weights if there are any, and a new head."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        drop_path = settings.regularization.drop_path
        model: nn.Module = build_classifier(
            settings.model, self.data.size, self.data.channels, self.classes, settings.head, drop_path
        )
        if settings.init != finetune.SCRATCH:
            source = find_model(Path(settings.init))
            load_encoder(model, read_weights(source), source)
        return model

    def loss_of(self, images: int) -> LossOf:
        """Cross-entropy, with mixed images where that is on."""
        statistics = statistics_of(self.data)
        mix, criterion = finetune.build_criterion(self.settings.regularization, self.classes, images)

        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            mixed, targets = mix(normalize(batch.images, statistics), batch.labels)
            loss: Tensor = criterion(model(mixed).float(), targets)
            return loss

        return loss_of


STAGES: dict[str, type[Any]] = {stage.stage: stage for stage in (Pretraining, Finetuning)}
