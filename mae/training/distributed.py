"""Accelerate carries the processes and the precision; here it is started, and not believed blindly."""

import hashlib
import os
from typing import Literal

import torch
from accelerate import Accelerator

from mae.errors import UserError

Precision = Literal["auto", "bf16", "fp32"]


def start_accelerator(precision: Precision) -> Accelerator:
    """An `Accelerator` with as many processes as were asked for, and the precision that was asked for.

    Raises:
        UserError: if the launcher silently started fewer processes, or the device lacks the precision.
    """
    _refuse_a_lost_launch()
    accelerator = Accelerator(mixed_precision=_mixed_precision(precision))
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {asked} processes but each runs alone "
            f"(Accelerate sees {accelerator.num_processes}), so all would write the same folder; "
            "on CPUs start `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N pipelines/...`"
        )
    return accelerator


def require_agreement(accelerator: Accelerator, **facts: str) -> None:
    """Every rank must hold the same facts, or nothing starts.

    Raises:
        UserError: on every rank, naming the facts that differ.
    """
    if accelerator.num_processes == 1:
        return
    hashes = [int.from_bytes(hashlib.sha256(f.encode()).digest()[:7], "big") for f in facts.values()]
    mine = torch.tensor([hashes], dtype=torch.int64, device=accelerator.device)
    everyone: torch.Tensor = accelerator.gather(mine)
    differing = [name for column, name in zip(everyone.T.tolist(), facts, strict=True) if len(set(column)) > 1]
    if differing:
        raise UserError(
            f"the processes differ in their {' and '.join(differing)}; "
            "start them all with the same command, files and library versions"
        )


def _mixed_precision(precision: Precision) -> str:
    from_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "auto" and from_launcher in ("fp16", "fp8"):
        raise UserError(
            f"the launcher asks for {from_launcher}, in which masked autoencoders diverge; allowed: bf16, no"
        )
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    uses_gpu = has_bf16 and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true", "yes")
    if precision == "bf16" and not uses_gpu:
        raise UserError("precision is bf16 but no GPU with bf16 is in use; allowed here: auto, fp32")
    return "bf16" if precision != "fp32" and uses_gpu else "no"


def _refuse_a_lost_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing.

    It does leave a trace: the address of a meeting point, with no world to meet.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        if "WORLD_SIZE" in os.environ:
            return
        raise UserError(
            "accelerate launch was asked for several CPU processes but started one; start "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N pipelines/...`, or pass --num_processes 1"
        )
