"""Start of Accelerate, with checks that it gives the processes and the precision that the user requested."""

import os
import re
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed

from mae.errors import UserError, world_size
from mae.processes import end_with_launcher
from mae.training.processes.first_error import answer_roll_calls
from mae.training.processes.fsdp2 import shard_on_any_device, sharding_asked_for
from mae.training.processes.rendezvous import INIT_METHOD

Precision = Literal["auto", "bf16", "fp32"]

# Variables that Accelerate reads, and others that mpirun sets.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_NUMBERS = (*_WORLD_SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_OF_SEVERAL = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DEVICE = "ACCELERATE_TORCH_DEVICE"
_DONE_BY_SETTINGS = {
    "ACCELERATE_DYNAMO_BACKEND": ("no", "the setting compile compiles the model (dynamo_config in Accelerate's file)"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "the setting micro_batch_size divides the batch"),
}
"""Variables by which Accelerate would wrap the model or divide gradients a second time: what is allowed, and why."""


def start_accelerator(precision: Precision, timeout: float = 600.0) -> Accelerator:
    """Return an `Accelerator` with the number of processes and the precision that were requested.

    Collectives end after `timeout` seconds. This process ends when its launcher does.

    Raises:
        UserError: if the launcher silently started fewer processes, they cannot reach each other, a requested GPU is
            missing, or it lacks the precision; or if a variable of the launcher is missing, has no meaning, or asks
            for what a setting does.
    """
    _require_whole_launch()
    _refuse_a_lost_launch()
    _refuse_a_lost_gpu()
    _refuse_an_unusable_device()
    _refuse_what_settings_do()
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
            f"the processes cannot meet at {place} ({str(error).splitlines()[0]}); check that rank 0 runs there, or "
            "choose another port (torchrun --master_port, accelerate launch --main_process_port)"
        ) from None
    except (ValueError, ImportError) as error:
        variables = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")))
        raise UserError(
            f"Accelerate cannot start: {' '.join(str(error).split())}; check the variables of the environment that it "
            f"reads: {', '.join(variables) or 'none is set'}"
        ) from None
    asked = next((int(os.environ[name]) for name in _WORLD_SIZES if name in os.environ), 1)
    if asked != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {asked} processes but each runs alone "
            f"(Accelerate sees {accelerator.num_processes}), so all would write to the same folder; "
            "on CPUs start `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N pipelines/...`"
        )
    shard_on_any_device(accelerator, sharding)
    if accelerator.num_processes > 1:
        answer_roll_calls()
    return accelerator


def _require_whole_launch() -> None:
    """Refuse variables of a launcher that are no numbers, or of which some are missing: a shell may have left them."""
    for name in _NUMBERS:
        text = os.environ.get(name)
        if text is not None and not re.fullmatch(r"-?\d+", text):  # -1 is a usual word for none
            raise UserError(f"{name} is {text!r}; allowed: a number, as a launcher sets it; unset it, or use torchrun")
    missing = [name for name in _OF_SEVERAL if name not in os.environ]
    if 0 < len(missing) < len(_OF_SEVERAL) and (processes := world_size()) > 1:
        raise UserError(
            f"WORLD_SIZE is {processes}, but {', '.join(missing)} is not set; start the processes by torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        )


def _process_group(timeout: float) -> InitProcessGroupKwargs:
    # Accelerate drops a timeout equal to its default of 600 s, and gloo then takes torch's default of 1800 s.
    return InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(seconds=timeout, microseconds=1))


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
    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return uses_cpu or os.environ.get(_DEVICE, "").startswith("cpu")


def _refuse_a_lost_gpu() -> None:
    """Refuse to train without a GPU when `CUDA_VISIBLE_DEVICES` reserves one for this process."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if re.match(r"\d|GPU-|MIG-", asked) and not torch.cuda.is_available() and not _is_on_cpu():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {asked} but torch {torch.__version__} sees no GPU: repair its driver or install "
            "a build with CUDA; or set ACCELERATE_USE_CPU=true to train on the CPU"
        )


def _refuse_an_unusable_device() -> None:
    """Refuse a device by name that torch does not know or that this machine lacks."""
    if (name := os.environ.get(_DEVICE)) is None:
        return
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{_DEVICE} is {name!r}, which cannot be used here ({reason}); unset it to take a GPU if there is one"
        ) from None


def _refuse_what_settings_do() -> None:
    for name, (allowed, instead) in _DONE_BY_SETTINGS.items():
        text = os.environ.get(name, allowed)
        if text.lower() != allowed:
            raise UserError(f"{name} is {text!r}; allowed: {allowed}, because {instead}; unset it")


def _refuse_a_lost_launch() -> None:
    """Refuse `accelerate launch --cpu --num_processes 2`, which silently starts one process.

    It sets the address where processes meet, but no world size.
    """
    is_from_launcher = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if _is_on_cpu() and is_from_launcher and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several CPU processes but started one; start "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N pipelines/...`, or pass --num_processes 1"
        )
