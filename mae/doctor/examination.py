"""Facts of a run that the checks use; each is computed once, in the same way as in the pipeline."""

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
from mae.doctor.sample import ImageSample, inspect_images
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
    """Property that is computed once; if that raises an error, each later access raises the same error."""

    def __init__(self, find: Callable[[Any], T]) -> None:
        self._find = find
        self._name = find.__name__
        self.__doc__ = find.__doc__

    def __get__(self, examination: "Examination", owner: type | None = None) -> T:
        known: dict[str, T | Exception] = examination.known
        if self._name not in known:
            try:
                known[self._name] = self._find(examination)
            except Exception as error:
                known[self._name] = error
        found = known[self._name]
        if isinstance(found, Exception):
            raise found
        return found


class Examination(ABC):
    """Facts of a run before it starts; each may raise a `UserError`."""

    stage: ClassVar[str]
    schema: ClassVar[Any]
    """Class of the pipeline's settings."""
    doctor_schema: ClassVar[Any]
    """Class of the pipeline's settings with those of the doctor added."""

    def __init__(self, argv: Sequence[str], say: Callable[[str], None]) -> None:
        self.argv, self.say = list(argv), say
        self.known: dict[str, Any] = {}
        self.rejected: list[str] = []
        """Messages about damaged checkpoints that are newer than the one to resume from."""

    @Fact
    def doctor_settings(self) -> Any:
        """Settings of the pipeline and of the doctor."""
        return parse(self.doctor_schema, spelled_out(self.argv), prog=f"mae doctor {self.stage}")

    @Fact
    def settings(self) -> Any:
        """Settings of the pipeline."""
        return self.schema(**{field.name: getattr(self.doctor_settings, field.name) for field in fields(self.schema)})

    @Fact
    def accelerator(self) -> Accelerator:
        """Accelerator, with the device and the precision of the run."""
        return start_accelerator(self.settings.precision, self.settings.timeout)

    @property
    def device(self) -> torch.device:
        """Device on which the run would train."""
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
        return torch.device("cpu" if on_cpu else "cuda")

    @Fact
    def processes(self) -> int:
        """Number of processes of the whole run."""
        asked: int | None = self.doctor_settings.processes
        check(asked is None or asked >= 1, "processes", asked, "1 or more")
        return asked or self._local_devices

    @property
    def local_processes(self) -> int:
        """Number of processes of the run on this machine."""
        return min(self.processes, self._local_devices) if self.device.type == "cuda" else self.processes

    @property
    def _local_devices(self) -> int:
        return torch.cuda.device_count() if self.device.type == "cuda" else 1

    @property
    def cores(self) -> int:
        """Number of cores that this process may use."""
        return default_workers()

    @Fact
    def shards(self) -> list[Shard]:
        """Shards of the training data."""
        return expand(self.settings.data.shards)

    @Fact
    def source(self) -> IndexedSource | StreamedSource:
        """Training data; a missing index is made, as in the run."""
        _ = self.shards  # an error of theirs is reported once, by the check of the shards
        return open_source(self.settings.data, self.say)

    @Fact
    def image_sample(self) -> ImageSample:
        """Some of the training images, decoded."""
        return inspect_images(self.source, self.settings.data)

    @property
    def folder(self) -> RunFolder:
        """Folder of the run."""
        return RunFolder(self.settings.run_dir)

    @Fact
    def data_settings(self) -> DataSettings:
        """Data settings with mean and std."""
        return with_statistics(self.settings, self.source, self.say)

    @property
    def run_settings(self) -> Any:
        """Settings as the run folder would hold them."""
        return replace(self.settings, data=self.data_settings, micro_batch_size=self.micro_batch_limit)

    @property
    @abstractmethod
    def task(self) -> Task:
        """Task of the run."""

    @Fact
    def plan(self) -> BatchPlan:
        """Division of the global batch."""
        return plan_batches(self.settings.batch_size, self.processes, self.micro_batch_limit)

    @Fact
    def micro_batch_search(self) -> MicroBatch | None:
        """Result of the search for a micro-batch; None if the settings or the run folder have one."""
        if self.folder.with_its_micro_batch(self.settings).micro_batch_size != AUTO:
            return None
        plan = plan_batches(self.settings.batch_size, self.processes, None)
        return find_micro_batch(self.task, self.accelerator, plan, self.local_processes, running=1)

    @property
    def micro_batch_limit(self) -> int | None:
        """Micro-batch of the search, the run folder or the settings; None without a limit."""
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
        """Model with its starting weights."""
        return self.task.build_model()

    @Fact
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return total_steps(self.samples, self.settings.epochs, self.settings.batch_size)

    @Fact
    def schedule(self) -> CosineSchedule:
        """Schedule of the learning rate."""
        batch = self.settings.batch_size
        return cosine_schedule(self.settings.optim, batch, self.settings.epochs, self.samples / batch, self.total_steps)

    @Fact
    def checkpoint(self) -> Checkpoint | None:
        """Checkpoint from which the run would resume; None for a new run."""
        found = newest_checkpoint(self.folder.checkpoints, self.rejected.append)
        if found is None and self.settings.resume is not None:
            return verify_checkpoint(self.settings.resume)
        return found

    @Fact
    def shared_memory(self) -> str:
        """Report on the shared memory for batches from the workers."""
        return shared_memory(self.batches, self.local_processes, self.task.unit)

    @Fact
    def open_files(self) -> str:
        """Report on the open files for shards, pipes and batches."""
        return open_files(len(self.shards), self.settings.data.workers)

    @Fact
    def trial(self) -> Trial:
        """Time and memory of a few steps; none are taken if shared memory or open files do not suffice for workers."""
        _ = self.shared_memory, self.open_files
        self.model.to(self.device)
        checkpoint_activations(self.model, self.settings.activation_checkpointing)
        return measure(self.task, self.accelerator, self.model, self.batches.plan)
