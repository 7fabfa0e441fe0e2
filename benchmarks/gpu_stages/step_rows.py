"""What the worker process measures for the stage step."""

import gc
import statistics
import time
from importlib.util import find_spec
from typing import Any

import torch
from torch._dynamo.utils import counters
from training_step import (
    CROSS,
    Case,
    Row,
    Step,
    build_step,
    flops_of,
    memory_at_peak,
    memory_from_here,
    synchronize,
    timed,
)

from mae.errors import is_out_of_memory
from mae.models.flops import peak_flops

from .arithmetic import mfu
from .results import Figures, SkippedError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    "s": Case("ViT-S/16", "small", 512),
    "b": Case("ViT-B/16", "base", 512),
    "l": Case("ViT-L/16", "large", 256),
    "h": Case("ViT-H/14", "huge", 128, patch=14),
    "t": Case("toy", "tiny", 2, side=32, patch=8, decoder=(64, 1, 2)),
}
_HEAD_WIDTH = 64
ROWS = {
    "plain": Row("plain", "manual", plain_update=True),
    "transformers, SDPA": Row("transformers"),
    "ours": Row(),
    "ours, compiled": Row(compiled="blocks"),
    "ours, fused loss": Row(compiled="blocks and loss"),
    "ours, CUDA graphs": Row(compiled="model", mode="reduce-overhead"),
    "ours, max-autotune": Row(compiled="model", mode="max-autotune"),
    "ours, heads of 64": Row(changed={"decoder_heads": 512 // _HEAD_WIDTH}),
    "ours, heads of 64, compiled": Row(compiled="blocks", changed={"decoder_heads": 512 // _HEAD_WIDTH}),
    "ours, cross": Row(changed=CROSS),
    "ours, cross, compiled": Row(compiled="blocks", changed=CROSS),
    "ours, blocks recomputed": Row(checkpointing="blocks"),
}
_LARGEST = ", largest batch"
_WARM_UP, _GROUPS, _STEPS = (3, 12, 5) if DEVICE.type == "cuda" else (1, 1, 1)
_MOST_SECONDS = 6.0
_MOST_IMAGES = 1 << (14 if DEVICE.type == "cuda" else 3)


def matrix_product() -> Figures:
    """Measure the rate of a large matrix product in bf16, the ceiling of any step on this device."""
    size, count = (8192, 20) if DEVICE.type == "cuda" else (256, 2)
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = list[float]()
    for _ in range(count):
        synchronize(DEVICE)
        began = time.perf_counter()
        left @ right
        synchronize(DEVICE)
        times.append(time.perf_counter() - began)
    rate = 2 * size**3 / statistics.median(times)
    return {"tflops": rate / 1e12, "peak_tflops_of_data_sheet": (peak_flops(DEVICE) or 0) / 1e12 or None}


def measure(model: str, name: str) -> Figures:
    """Return the figures of a row; if a batch does not fit, half of it is tried, and so on."""
    if name.startswith("transformers") and find_spec("transformers") is None:
        raise SkippedError("transformers is not installed")
    case = CASES[model]
    if name.endswith(_LARGEST):
        return largest_batch(case, ROWS[name.removesuffix(_LARGEST)])
    batch = case.batch
    while (found := without_running_out(timed_row, case, ROWS[name], batch)) is None and batch > 1:
        batch //= 2
    if found is None:
        raise torch.OutOfMemoryError("not even one image fits into memory")
    return dict(found)


def timed_row(case: Case, row: Row, batch: int) -> Figures:
    """Return speed and memory of a step; each time is the mean of a few steps with one wait at their end.

    If torch does without CUDA graphs, it only writes a warning to the log: `graphs_dropped` counts these.
    """
    before, began = memory_from_here(DEVICE), time.perf_counter()
    dropped = counters["inductor"]["cudagraph_skips"]
    step = build_step(case, row, batch, DEVICE, "inductor" if DEVICE.type == "cuda" else "aot_eager")
    loss = step().item()
    first_seconds = time.perf_counter() - began
    timed(step, _WARM_UP, DEVICE)
    times, until = list[float](), time.perf_counter() + _MOST_SECONDS
    while len(times) < _GROUPS and (len(times) < 2 or time.perf_counter() < until):
        times.append(timed(step, _STEPS, DEVICE).wall)
    seconds, flops = statistics.median(times), flops_of(case, row)
    peak_bytes = memory_at_peak(DEVICE) - before if DEVICE.type == "cuda" else None
    return {
        "batch": batch, "step_ms": 1000 * seconds, "images_per_second": batch / seconds,
        "mfu": mfu(batch / seconds, flops, peak_flops(DEVICE)), "flops_per_image": flops,
        "peak_bytes": peak_bytes, "loss": loss, "first_step_seconds": first_seconds,
        "spread": (max(times) - min(times)) / seconds,
        "graphs_dropped": counters["inductor"]["cudagraph_skips"] - dropped if row.compiled == "model" else None,
    }  # fmt: skip


def largest_batch(case: Case, row: Row) -> Figures:
    """Return the largest number of images, of the case's batch doubled again and again, with which a step fits."""
    found, batch = 0, case.batch
    while batch <= _MOST_IMAGES and without_running_out(one_step, case, row, batch):
        found, batch = batch, 2 * batch
    return {"largest_batch": found}


def one_step(case: Case, row: Row, batch: int) -> bool:
    step: Step = build_step(case, row, batch, DEVICE)
    step(1)  # creates the moments
    step().item()
    return True


def without_running_out(work: Any, *arguments: Any) -> Any:
    """Return what `work` returns, or None if the device has too little memory; nothing of it stays in memory."""
    try:
        return work(*arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        torch._dynamo.reset()
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
