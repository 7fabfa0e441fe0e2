"""Commands that the doctor examines, each with its settings and its task."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mae.data.source import IndexedSource
from mae.doctor.examination import Examination, Fact
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.finetuning import Finetuning
from mae.tasks.pretraining import Pretraining, PretrainSettings


@dataclass(frozen=True)
class PretrainDoctorSettings(PretrainSettings):
    """Check a pretraining before it starts: write `mae doctor` instead of `mae pretrain`, with the same settings.

    `mae doctor finetune` checks a fine-tuning. Exit code 0: start; 2: do not start. No run folder is made.
    """

    EXAMPLE: ClassVar = "mae doctor --data.shards 'train-*.tar' --run_dir runs/first"
    FIRST: ClassVar = ("processes", *PretrainSettings.FIRST)

    processes: int | None = None
    """Number of processes of the run on all machines; None: one per GPU of this machine, or one on CPUs."""


@dataclass(frozen=True)
class FinetuneDoctorSettings(FinetuneSettings):
    """Check a fine-tuning before it starts: write `mae doctor finetune` instead of `mae finetune`.

    Exit code 0: start; 2: do not start. No run folder is made.
    """

    EXAMPLE: ClassVar = "mae doctor finetune --data.shards 'train-*.tar' --run_dir runs/two"
    FIRST: ClassVar = ("processes", *FinetuneSettings.FIRST)

    processes: int | None = None
    """Number of processes of the run on all machines; None: one per GPU of this machine, or one on CPUs."""


class PretrainExamination(Examination):
    """Facts of a pretraining."""

    stage, schema, doctor_schema = "pretrain", PretrainSettings, PretrainDoctorSettings

    @Fact
    def task(self) -> Pretraining:
        """Task of the run."""
        return Pretraining(replace(self.settings, data=self.data_settings), self.source)


class FinetuneExamination(Examination):
    """Facts of a fine-tuning."""

    stage, schema, doctor_schema = "finetune", FinetuneSettings, FinetuneDoctorSettings

    @Fact
    def task_without_statistics(self) -> Finetuning:
        """Task without mean and std, which is enough to check its labels."""
        assert isinstance(self.source, IndexedSource)  # the settings allow no other
        return Finetuning.without_statistics(self.settings, self.source, self.say)

    @Fact
    def task(self) -> Finetuning:
        """Task of the run."""
        return replace(self.task_without_statistics, settings=replace(self.settings, data=self.data_settings))

    @property
    def samples(self) -> int:
        """Number of samples in an epoch: those of the subset, or all."""
        subset = self.task_without_statistics.subset
        return self.source.samples if subset is None else len(subset)


STAGES: dict[str, type[Any]] = {stage.stage: stage for stage in (PretrainExamination, FinetuneExamination)}
