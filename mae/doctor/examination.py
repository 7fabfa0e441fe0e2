"""What the checks look at: each fact of a run is found out once, as its pipeline would find it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from mae.data.batches import BatchPlan, TrainBatches, plan_batches
from mae.data.index import ShardIndex
from mae.data.prepare import open_shards
from mae.data.settings import DataSettings
from mae.data.store.shards import Shard, expand
from mae.data.stream import StreamBatches
from mae.doctor.limits import open_files, shared_memory
from mae.doctor.sample import ImageSample, look_at_index, look_at_stream
from mae.doctor.trial import Trial, measure
from mae.models.execution import checkpoint_activations
from mae.processes import default_workers
from mae.settings import check, parse
from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint, verify_checkpoint
from mae.training.loop import LossOf, total_steps
from mae.training.micro_batch import Fit
from mae.training.optimizer import CosineSchedule, build_optimizer, cosine_schedule, parameter_groups
from mae.training.processes.accelerator import start_accelerator
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import AUTO, spelled_out

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
    def asked(self) -> Any:
        """The settings as they are written, with the doctor's own."""
        return parse(self.doctor_schema, spelled_out(self.argv), prog=f"mae doctor {self.stage}")

    @Fact
    def settings(self) -> Any:
        """The settings that the pipeline would parse."""
        return self.schema(**{field.name: getattr(self.asked, field.name) for field in fields(self.schema)})

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
        asked: int | None = self.asked.processes
        check(asked is None or asked >= 1, "processes", asked, "1 or more")
        return asked or self._devices_here

    @property
    def processes_here(self) -> int:
        """Of the run, on this machine."""
        return min(self.processes, self._devices_here) if self.device.type == "cuda" else self.processes

    @property
    def _devices_here(self) -> int:
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
    def index(self) -> ShardIndex | None:
        """Of the shards, made where the pipeline would make it; a stream has none."""
        _ = self.shards  # what is wrong with their names is told once
        if self.settings.data.reader == "stream":
            return None
        return open_shards(self.settings.data.shards, self.settings.data, self.say)

    @Fact
    def sample(self) -> ImageSample:
        """Some of the images."""
        if self.index is None:
            return look_at_stream(self.shards[0], self.settings.data)
        return look_at_index(self.index, self.settings.data)

    @Fact
    def folder(self) -> RunFolder:
        """Of the run."""
        return RunFolder(self.settings.run_dir)

    @Fact
    @abstractmethod
    def data(self) -> DataSettings:
        """With mean and std filled in."""

    @property
    def measured(self) -> Any:
        """The settings with mean and std."""
        return replace(self.settings, data=self.data)

    @property
    def resolved(self) -> Any:
        """The settings as the run folder holds them."""
        return replace(self.measured, micro_batch_size=self.micro_batch_limit)

    @Fact
    def plan(self) -> BatchPlan:
        """How a global batch is dealt out."""
        return plan_batches(self.settings.batch_size, self.processes, self.micro_batch_limit)

    @Fact
    def fit(self) -> Fit | None:
        """The micro-batch that a trial finds; None if none is asked for, or the run has begun with its own."""
        if self.folder.with_its_micro_batch(self.settings).micro_batch_size != AUTO:
            return None
        return self.find_micro_batch(plan_batches(self.settings.batch_size, self.processes, None))

    @property
    def micro_batch_limit(self) -> int | None:
        """As asked for, as the run began with, or as found by trial."""
        if self.fit is not None:
            return self.fit.images
        limit: int | None = self.folder.with_its_micro_batch(self.settings).micro_batch_limit
        return limit

    @abstractmethod
    def find_micro_batch(self, plan: BatchPlan) -> Fit:
        """By the trial that the run would make."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """In an epoch."""

    @property
    def unit(self) -> int:
        """Images of which a micro-batch holds a multiple."""
        return int(self.settings.unit)

    @abstractmethod
    def batches_of(self, plan: BatchPlan) -> TrainBatches | StreamBatches:
        """What rank 0 trains on."""

    @Fact
    def batches(self) -> TrainBatches | StreamBatches:
        """Those of the run."""
        return self.batches_of(self.plan)

    @abstractmethod
    def loss_of(self, images: int) -> LossOf:
        """The loss of micro-batches of so many images."""

    @Fact
    @abstractmethod
    def model(self) -> nn.Module:
        """As it would begin to train."""

    @Fact
    def total(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.samples, self.settings.epochs, self.settings.batch_size)

    @Fact
    def schedule(self) -> CosineSchedule:
        """The learning rate."""
        batch = self.settings.batch_size
        return cosine_schedule(self.settings.optim, batch, self.settings.epochs, self.samples / batch, self.total)

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
        return shared_memory(self.batches, self.processes_here, self.unit)

    @Fact
    def open_files(self) -> str:
        """For shards, pipes and batches."""
        return open_files(len(self.shards), self.settings.data.workers)

    @Fact
    def trial(self) -> Trial:
        """A few steps of the first batches, as the run would take them; not tried without what workers need."""
        optim, plan = self.settings.optim, self.batches.plan
        _ = self.shared_memory, self.open_files
        groups = parameter_groups(self.model, optim.weight_decay, getattr(optim, "layer_decay", 1.0))
        self.model.to(self.device)
        checkpoint_activations(self.model, self.settings.activation_checkpointing)
        return measure(
            self.accelerator,
            self.model,
            build_optimizer(groups, optim, self.device),
            self._batches_of_one_process,
            self.loss_of,
            asked=plan.per_process,
            micro_batches=min(2, plan.accumulation),
            unit=self.unit,
            data=self.data,
            timeout=self.settings.timeout,
        )

    def _batches_of_one_process(self, images: int) -> TrainBatches | StreamBatches:
        return self.batches_of(BatchPlan(images, processes=1, per_process=images, accumulation=1))
