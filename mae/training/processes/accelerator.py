"""Accelerate carries the processes and the precision; here it is started, and not believed blindly."""

import faulthandler
import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from itertools import zip_longest
from textwrap import shorten
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed

from mae import __version__
from mae.errors import UserError
from mae.processes import end_with_launcher
from mae.training.processes.first_error import answer_roll_calls
from mae.training.processes.fsdp2 import shard_on_any_device, sharding_asked_for
from mae.training.processes.rendezvous import INIT_METHOD

Precision = Literal["auto", "bf16", "fp32"]

# Those that Accelerate reads, and those that mpirun sets besides.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def start_accelerator(precision: Precision, timeout: float = 600.0) -> Accelerator:
    """An `Accelerator` with as many processes as were asked for, and the precision that was asked for.

    Every collective ends after `timeout` seconds; this process ends with the launcher that started it.

    Raises:
        UserError: if the launcher silently started fewer processes, they do not find each other, there is no GPU
            though one was asked for, or it lacks the precision.
    """
    _refuse_a_lost_launch()
    _refuse_a_lost_gpu()
    end_with_launcher()
    mixed_precision, sharding = _mixed_precision(precision), sharding_asked_for()
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            fsdp_plugin=sharding,
            kwargs_handlers=[_process_group(timeout)],
        )
    except (distributed.DistNetworkError, distributed.DistStoreError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes cannot meet at {place} ({str(error).splitlines()[0]}); see whether rank 0 runs there, or "
            "choose another port (torchrun --master_port, accelerate launch --main_process_port)"
        ) from None
    asked = next((int(os.environ[name]) for name in _WORLD_SIZES if name in os.environ), 1)
    if asked != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {asked} processes but each runs alone "
            f"(Accelerate sees {accelerator.num_processes}), so all would write the same folder; "
            "on CPUs start `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N pipelines/...`"
        )
    shard_on_any_device(accelerator, sharding)
    if accelerator.num_processes > 1:
        answer_roll_calls()
    return accelerator


def _process_group(timeout: float) -> InitProcessGroupKwargs:
    # Accelerate drops what equals its own default, 600 s, also for gloo, which then takes torch's default, 1800 s.
    return InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(seconds=timeout, microseconds=1))


def library_versions() -> dict[str, str]:
    """Version of all that can change a number or a file."""
    return {
        "python": platform.python_version(),
        "mae": __version__,
        "torch": torch.__version__,  # with its build, which the package's version lacks
        **{name: version(name) for name in ("timm", "accelerate", "numpy", "safetensors")},
    }


class Ballot:
    """Small numbers that all ranks agree on in each step, while the device computes.

    It has connections of its own, through the processors: the host of a rank learns the outcome without waiting for
    its device, and a rank that is gone is noticed within the step.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self._group: distributed.ProcessGroup | None = None
        if accelerator.num_processes > 1:
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, distributed.ProcessGroup)
            self._group = group
        self._votes: Tensor | list[int] | None = None
        self._work: distributed.Work | None = None

    def cast(self, *votes: int) -> None:
        """Give this rank's votes; returns at once."""
        assert self._votes is None, "the last result has not been asked for"
        if self._group is None:
            self._votes = list(votes)
        else:
            self._votes = torch.tensor(votes, dtype=torch.int64)
            self._work = distributed.all_reduce(
                self._votes, op=distributed.ReduceOp.MAX, group=self._group, async_op=True
            )

    def result(self) -> list[int]:
        """The greatest vote of each place over all ranks; waits for the last of them.

        Raises:
            RuntimeError: if contact to a rank is lost, or it has not voted within the timeout.
        """
        assert self._votes is not None, "nothing has been cast"
        if self._work is not None:
            self._work.wait()
        votes, self._votes, self._work = self._votes, None, None
        return votes if isinstance(votes, list) else votes.tolist()


class Stacks:
    """Writes the stacks of all threads to stderr when a step takes nearly as long as the timeout of the collectives:
    where it is stuck.

    A watch in C does so, even if the interpreter itself is stuck. Setting it takes a thread, so it is set once a
    second at most.
    """

    def __init__(self, timeout: float) -> None:
        # Not later than the collectives of those who wait for this rank, and end the job.
        self._seconds = 0.9 * timeout
        self._next_time = 0.0

    def alive(self) -> None:
        """Begin to count again; to be called in each step."""
        now = time.monotonic()
        if now >= self._next_time:
            self._next_time = now + min(1.0, self._seconds / 10)
            faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or sys.stderr)

    def stop(self) -> None:
        """Watch no longer."""
        self._next_time = 0.0
        faulthandler.cancel_dump_traceback_later()


def require_agreement(accelerator: Accelerator, **facts: str) -> None:
    """Every rank must hold the same facts, or nothing starts.

    Raises:
        UserError: on every rank, naming the facts that differ, and the first difference in each.
    """
    if accelerator.num_processes == 1:
        return
    names = ", ".join(facts)
    if any(_differ(accelerator, [names])):
        facts = {"versions of mae, which compare": names}
    differs = _differ(accelerator, list(facts.values()))
    differing = [
        f"{name}: {_difference(_of_all_ranks(accelerator, fact))}"
        for (name, fact), is_different in zip(facts.items(), differs, strict=True)
        if is_different
    ]
    if differing:
        raise UserError(
            f"the processes differ in their {'; '.join(differing)}; "
            "start them all with the same command, files and library versions"
        )


def _differ(accelerator: Accelerator, facts: Sequence[str]) -> list[bool]:
    """Of each fact, whether the ranks hold different ones."""
    hashes = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:7], "big") for fact in facts]
    everyone: Tensor = accelerator.gather(torch.tensor([hashes], dtype=torch.int64, device=accelerator.device))
    return [len(set(column)) > 1 for column in everyone.T.tolist()]


def _of_all_ranks(accelerator: Accelerator, fact: str) -> list[str]:
    """A text of any length of each rank; as bytes, for nothing is unpickled here."""
    data = fact.encode()
    lengths = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    padded = torch.tensor([list(data.ljust(max(lengths)))], dtype=torch.uint8, device=accelerator.device)
    everyone = accelerator.gather(padded).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(everyone, lengths, strict=True)]


def _difference(texts: Sequence[str]) -> str:
    """The first part (a line, or what stands between commas) in which a rank differs from rank 0."""
    rank = next(rank for rank, text in enumerate(texts) if text != texts[0])
    parts = zip_longest(*(re.split(r"[\n,]", texts[which]) for which in (0, rank)), fillvalue="")
    ours, theirs = next((ours, theirs) for ours, theirs in parts if ours != theirs)
    return f"{shorten(ours, 80) or 'nothing'} on rank 0, {shorten(theirs, 80) or 'nothing'} on rank {rank}"


def _mixed_precision(precision: Precision) -> str:
    from_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "auto" and from_launcher in ("fp16", "fp8"):
        raise UserError(
            f"the launcher asks for {from_launcher}, in which masked autoencoders diverge; allowed: bf16, no"
        )
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    uses_gpu = has_bf16 and not _is_on_cpu()
    if precision == "bf16" and not uses_gpu:
        raise UserError("precision is bf16 but no GPU with bf16 is in use; allowed here: auto, fp32")
    return "bf16" if precision != "fp32" and uses_gpu else "no"


def _is_on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def _refuse_a_lost_gpu() -> None:
    """Where a scheduler or a person has set GPUs apart for this process, it shall not go on without in silence."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if re.match(r"\d|GPU-|MIG-", asked) and not torch.cuda.is_available() and not _is_on_cpu():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {asked} but torch {torch.__version__} sees no GPU: mend its driver or install a "
            "build with CUDA; or set ACCELERATE_USE_CPU=true to train on the processors"
        )


def _refuse_a_lost_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing.

    It does leave a trace: the address of a meeting point, with no world to meet.
    """
    if _is_on_cpu() and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        if "WORLD_SIZE" in os.environ:
            return
        raise UserError(
            "accelerate launch was asked for several CPU processes but started one; start "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N pipelines/...`, or pass --num_processes 1"
        )
