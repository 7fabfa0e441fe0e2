"""What the checks look at: each fact of a run is found out once, as its pipeline would find it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from mae.data.batch import TrainingBatches
from mae.data.plan import BatchPlan, plan_batches
from mae.data.settings import DataSettings
from mae.data.source import IndexedSource, StreamedSource, open_source
from mae.data.store.shards import Shard, expand
from mae.doctor.limits import open_files, shared_memory
from mae.doctor.sample import ImageSample, look_at
from mae.doctor.trial import Trial, measure
from mae.models.execution import checkpoint_activations
from mae.processes import default_workers
from mae.settings import check, parse
from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint, verify_checkpoint
from mae.training.job import total_steps
from mae.training.micro_batch import MicroBatch, find_micro_batch
from mae.training.optimizer import CosineSchedule, cosine_schedule
from mae.training.origin import with_statistics
from mae.training.processes.accelerator import start_accelerator
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import AUTO, spelled_out
from mae.training.task import Task

T = TypeVar("T")


class Fact(Generic[T]):
    """A property that is found out once; the error that this ended in is raised again for whoever asks next."""

    def __init__(self, find: Callable[[Any], T]) -> None:
        self._find = find
        self._name = find.__name__
        self.__doc__ = find.__doc__

    def __get__(self, examination: "Examination", owner: type | None = None) -> T:
        known: dict[str, T | Exception] = examination.known
        if self._name not in known:
            try:
                known[self._name] = self._find(examination)
            except Exception as error:  # raised below
                known[self._name] = error
        found = known[self._name]
        if isinstance(found, Exception):
            raise found
        return found


class Examination(ABC):
    """The facts of one run to come; each may raise a `UserError`."""

    stage: ClassVar[str]
    schema: ClassVar[Any]
    """Settings of the pipeline."""
    doctor_schema: ClassVar[Any]
    """The same with the doctor's own."""

    def __init__(self, argv: Sequence[str], say: Callable[[str], None]) -> None:
        self.argv, self.say = list(argv), say
        self.known: dict[str, Any] = {}
        self.rejected: list[str] = []
        """Damaged checkpoints that are newer than the one that the run would go on from."""

    @Fact
    def doctor_settings(self) -> Any:
        """The settings as they are written, with the doctor's own."""
        return parse(self.doctor_schema, spelled_out(self.argv), prog=f"mae doctor {self.stage}")

    @Fact
    def settings(self) -> Any:
        """The settings that the pipeline would parse."""
        return self.schema(**{field.name: getattr(self.doctor_settings, field.name) for field in fields(self.schema)})

    @Fact
    def accelerator(self) -> Accelerator:
        """Device and precision."""
        return start_accelerator(self.settings.precision, self.settings.timeout)

    @property
    def device(self) -> torch.device:
        """On which the run would train."""
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
        return torch.device("cpu" if on_cpu else "cuda")

    @Fact
    def processes(self) -> int:
        """Of the whole run."""
        asked: int | None = self.doctor_settings.processes
        check(asked is None or asked >= 1, "processes", asked, "1 or more")
        return asked or self._local_devices

    @property
    def local_processes(self) -> int:
        """Of the run, on this machine."""
        return min(self.processes, self._local_devices) if self.device.type == "cuda" else self.processes

    @property
    def _local_devices(self) -> int:
        return torch.cuda.device_count() if self.device.type == "cuda" else 1

    @property
    def cores(self) -> int:
        """Processors that this process may use."""
        return default_workers()

    @Fact
    def shards(self) -> list[Shard]:
        """Of the training data."""
        return expand(self.settings.data.shards)

    @Fact
    def source(self) -> IndexedSource | StreamedSource:
        """Training data; a missing index is made, as the run would make it."""
        _ = self.shards  # wrong names are reported by the check of the shards
        return open_source(self.settings.data, self.say)

    @Fact
    def image_sample(self) -> ImageSample:
        """Some of the images, decoded."""
        return look_at(self.source, self.settings.data)

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return RunFolder(self.settings.run_dir)

    @Fact
    def data_settings(self) -> DataSettings:
        """Data settings with mean and std filled in."""
        return with_statistics(self.settings, self.source, self.say)

    @property
    def run_settings(self) -> Any:
        """The settings as the run folder holds them."""
        return replace(self.settings, data=self.data_settings, micro_batch_size=self.micro_batch_limit)

    @property
    @abstractmethod
    def task(self) -> Task:
        """The task of the run."""

    @Fact
    def plan(self) -> BatchPlan:
        """How a global batch is dealt out."""
        return plan_batches(self.settings.batch_size, self.processes, self.micro_batch_limit)

    @Fact
    def micro_batch_search(self) -> MicroBatch | None:
        """The micro-batch found by search; None if none is asked for, or the run began with one."""
        if self.folder.with_its_micro_batch(self.settings).micro_batch_size != AUTO:
            return None
        plan = plan_batches(self.settings.batch_size, self.processes, None)
        return find_micro_batch(self.task, self.accelerator, plan, self.local_processes, running=1)

    @property
    def micro_batch_limit(self) -> int | None:
        """The micro-batch that is asked for, that the run began with, or that was found by search."""
        if self.micro_batch_search is not None:
            return self.micro_batch_search.images
        limit: int | None = self.folder.with_its_micro_batch(self.settings).micro_batch_limit
        return limit

    @property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return self.source.samples

    @Fact
    def batches(self) -> TrainingBatches:
        """Training batches of rank 0."""
        self.task.loss_of(self.plan.per_process)  # mixup refuses an odd number of images
        return self.task.batches(self.plan, rank=0)

    @Fact
    def model(self) -> nn.Module:
        """The model with its starting weights."""
        return self.task.build_model()

    @Fact
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.samples, self.settings.epochs, self.settings.batch_size)

    @Fact
    def schedule(self) -> CosineSchedule:
        """The learning rate."""
        batch = self.settings.batch_size
        return cosine_schedule(self.settings.optim, batch, self.settings.epochs, self.samples / batch, self.total_steps)

    @Fact
    def checkpoint(self) -> Checkpoint | None:
        """From which the run would go on."""
        found = newest_checkpoint(self.folder.checkpoints, self.rejected.append)
        if found is None and self.settings.resume is not None:
            return verify_checkpoint(self.settings.resume)
        return found

    @Fact
    def shared_memory(self) -> str:
        """For batches on their way from the workers."""
        return shared_memory(self.batches, self.local_processes, self.task.unit)

    @Fact
    def open_files(self) -> str:
        """For shards, pipes and batches."""
        return open_files(len(self.shards), self.settings.data.workers)

    @Fact
    def trial(self) -> Trial:
        """A few steps of the first batches, as the run would take them; not tried without what workers need."""
        _ = self.shared_memory, self.open_files
        self.model.to(self.device)
        checkpoint_activations(self.model, self.settings.activation_checkpointing)
        return measure(self.task, self.accelerator, self.model, self.batches.plan)
