"""The two stages that can be examined, as their pipelines build them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mae.data.batches import BatchPlan, TrainBatches, labelled_subset
from mae.data.index import ShardIndex
from mae.data.prepare import open_shards
from mae.data.settings import DataSettings
from mae.data.stream import StreamBatches
from mae.doctor.examination import Examination, Fact
from mae.pipelines import finetune, pretrain
from mae.training.loop import LossOf
from mae.training.micro_batch import Fit
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
        """As the run began with, as set, as the starting weights have it, or as measured."""
        data = self.folder.with_its_statistics(self.settings.data)
        source = self.shards if self.index is None else self.index
        resolved: DataSettings = pretrain.resolve_data(replace(self.settings, data=data), source, self.say)
        return resolved

    @property
    def samples(self) -> int:
        """Of the index, or those that count as an epoch of a stream."""
        if self.index is not None:
            return len(self.index)
        return int(self.settings.data.stream_samples)

    def batches_of(self, plan: BatchPlan) -> TrainBatches | StreamBatches:
        """Images and the noise of their masks."""
        source = self.shards if self.index is None else self.index
        batches: TrainBatches | StreamBatches = pretrain.build_batches(self.measured, source, plan, rank=0)
        return batches

    @Fact
    def model(self) -> nn.Module:
        """Encoder and decoder."""
        model: nn.Module = pretrain.build_model(self.measured)
        return model

    def loss_of(self, images: int) -> LossOf:
        """Of what is hidden."""
        loss_of: LossOf = pretrain.loss_function(self.measured)
        return loss_of

    def find_micro_batch(self, plan: BatchPlan) -> Fit:
        """On this process alone."""
        fit: Fit = pretrain.find_micro_batch(self.measured, self.accelerator, plan, self.processes_here, running=1)
        return fit


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

    def batches_of(self, plan: BatchPlan) -> TrainBatches | StreamBatches:
        """Images and labels."""
        self.loss_of(plan.per_process)  # mixup refuses an odd number of images
        settings = self.settings
        return TrainBatches(self.labelled, plan, 0, settings.seed, self.data, settings.augment, subset=self.subset)

    @Fact
    def model(self) -> nn.Module:
        """The encoder, with its pretrained weights if there are any, and a new head."""
        model: nn.Module = finetune.build_model(self.measured, self.classes)
        return model

    def loss_of(self, images: int) -> LossOf:
        """Cross-entropy, with mixed images where that is on."""
        loss_of: LossOf = finetune.loss_function(self.measured, self.classes, images)
        return loss_of

    def find_micro_batch(self, plan: BatchPlan) -> Fit:
        """On this process alone."""
        here = self.processes_here
        fit: Fit = finetune.find_micro_batch(self.measured, self.accelerator, self.classes, plan, here, running=1)
        return fit


STAGES: dict[str, type[Any]] = {stage.stage: stage for stage in (Pretraining, Finetuning)}
