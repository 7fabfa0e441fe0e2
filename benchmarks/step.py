"""Speed and memory of a training step, compared with a plain implementation and `transformers`.

`python benchmarks/step.py [--case NAME]... [--row NAME]... [--rounds N] [--threads N] [--no-memory] [--json FILE]`

A step is forward, backward, AdamW and zeroing of the gradients, with the same weights, images and noise in each row.
*Plain* computes everything as the paper's first code does, with torch's own AdamW, and reads the loss in each step
(`benchmarks/models.py`). `transformers` also uses torch's own AdamW. Ours trains like `mae pretrain`: fused AdamW, no
wait for the loss. *Loss* is the relative difference of the first loss from plain's; rows without it compute something
else: fewer patches, or another decoder.

The rows take turns in random order. Times are medians, and a ratio is the median of the ratios within each round.
Without a GPU, CPU time counts, which other programs change less than wall time; both are shown. The peak
memory is all that a step needs beyond its imports, in a separate process, with a batch where activations dominate.
With a GPU, the time is the wall time of ten steps with one wait at their end, in bf16. Last come the speed of
`mae pretrain` from JPEG shards and the largest batches. Each table is printed, and written, as soon as it is ready.
On a GPU all of it should take nine minutes; this has not been measured yet.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from models import PlainMaskedAutoencoder, transformers_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.execution import Checkpointing, checkpoint_activations, compile_blocks
from mae.models.flops import autoencoder_flops, peak_flops
from mae.models.patches import patchify, take
from mae.models.settings import MaskedAutoencoderSettings
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups

CHANNELS = 3
LR, WEIGHT_DECAY = 1e-4, 0.05
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
STEPS_AT_ONCE, WARM_UP = (10, 4) if GPU else (1, 2)
LARGEST_BATCH = 1 << 14
E2E_STEPS, E2E_LOG_EVERY, E2E_IMAGES = 120, 20, 4000


@dataclass(frozen=True)
class Case:
    """A model, and how many images a step takes."""

    name: str
    size: Literal["tiny", "small", "base", "large"]
    batch: int
    memory_batch: int
    """Number of images when memory is measured."""
    side: int = 224
    patch: int = 16
    decoder: tuple[int | None, int | None, int | None] = (512, 8, 16)
    """Width, blocks and heads; by default the paper's, which are meant for larger encoders than Ti and S."""

    def settings(self) -> MaskedAutoencoderSettings:
        width, depth, heads = self.decoder
        return MaskedAutoencoderSettings(
            size=self.size, patch_size=(self.patch,), decoder_width=width, decoder_depth=depth, decoder_heads=heads
        )


CPU_CASES = {
    "64": Case("ViT-Ti/8, 64 px", "tiny", 32, 128, 64, 8, (None, None, None)),
    "ti": Case("ViT-Ti/16, 224 px", "tiny", 8, 32),
    "s": Case("ViT-S/16, 224 px", "small", 8, 32),
    "b": Case("ViT-B/16, 224 px", "base", 8, 64),
}
GPU_CASES = {
    "b": Case("ViT-B/16, 224 px", "base", 256, 256),
    "l": Case("ViT-L/16, 224 px", "large", 256, 256),
}
CASES = GPU_CASES if GPU else CPU_CASES


@dataclass(frozen=True)
class Row:
    """A model and the way it is trained."""

    model: Literal["ours", "plain", "transformers"] = "ours"
    attention: Literal["manual", "eager", "sdpa"] = "sdpa"
    plain_update: bool = False
    """Use torch's own AdamW, and wait for the loss in each step."""
    all_patches: bool = False
    """Predict the visible patches too."""
    checkpointing: Checkpointing = "none"
    compiled: bool = False
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Model settings with which the loss differs from plain's."""


QUARTER: dict[str, Any] = {"predict_ratio": 0.25}
CROSS: dict[str, Any] = {**QUARTER, "decoder": "cross", "decoder_depth": None}
PRESET: dict[str, Any] = {"decoder_width": None, "decoder_depth": None, "decoder_heads": None}

REFERENCE = "plain"
ROWS = {
    REFERENCE: Row("plain", "manual", plain_update=True),
    "plain, SDPA": Row("plain", plain_update=True),
    "plain, SDPA, our update": Row("plain"),
    "transformers, eager": Row("transformers", "eager"),
    "transformers, SDPA": Row("transformers"),
    "ours": Row(),
    "ours, plain's update": Row(plain_update=True),
    "ours, all patches predicted": Row(all_patches=True),
    "ours, GELU recomputed": Row(checkpointing="gelu"),
    "ours, blocks recomputed": Row(checkpointing="blocks"),
    "ours, compiled": Row(compiled=True),
    "ours, a quarter predicted": Row(changed=QUARTER),
    "ours, cross, a quarter": Row(changed=CROSS),
    "ours, cross, a quarter, GELU recomputed": Row(changed=CROSS, checkpointing="gelu"),
    "ours, cross, a quarter, compiled": Row(changed=CROSS, compiled=True),
    "ours, preset decoder": Row(changed=PRESET),
    "ours, preset decoder, cross, a quarter": Row(changed=CROSS | PRESET),
}
LARGEST_BATCH_ROWS = (REFERENCE, "ours", "ours, blocks recomputed")


Step = Callable[..., Tensor]
"""Function: number of images (default: all) -> loss."""


class Times(NamedTuple):
    """Seconds of a step."""

    wall: float
    cpu: float
    """CPU seconds of all threads of this process."""


@dataclass
class Result:
    """Results of a row."""

    case: str
    row: str
    batch: int
    flops: int
    """FLOPs of a training step on one image, for our model with the settings of this row."""
    times: list[Times] = field(default_factory=list)
    loss: float = math.nan
    """Loss of the first step."""
    memory: int | None = None
    """Peak memory [bytes] with `memory_batch` images."""
    error: str = ""

    def seconds(self) -> list[float]:
        """Return the times that count: wall time with a GPU, otherwise CPU time."""
        return [times.wall if GPU else times.cpu for times in self.times]


# What is measured.


def rows_of(case: Case, names: Sequence[str] | None) -> dict[str, Row]:
    """Return the named rows and plain, without the rows of the preset decoder if the case already has it."""
    same = replace(case.settings(), **PRESET).decoder_shape == case.settings().decoder_shape
    return {
        name: row
        for name, row in ROWS.items()
        if (name == REFERENCE or not names or name in names) and not (same and PRESET.keys() <= row.changed.keys())
    }


def settings_of(case: Case, row: Row) -> MaskedAutoencoderSettings:
    return replace(case.settings(), **row.changed)


def build_step(case: Case, row: Row, batch: int) -> Step:
    """Return the training step of a row; weights, images and noise are the same for each row."""
    torch.manual_seed(0)
    with DEVICE:
        ours = MaskedAutoencoder(settings_of(case, row), (case.side, case.side), CHANNELS)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, CHANNELS, case.side, case.side, generator=generator).to(DEVICE)
    noise = torch.rand(batch, ours.patches, generator=generator).to(DEVICE)
    model, loss_of = model_and_loss(ours, row)
    model.to(DEVICE).train()
    optimizer = build_adamw(model, row)

    def step(taken: int = batch) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = loss_of(images[:taken], noise[:taken])
        if row.plain_update:
            loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if row.plain_update:
            synchronize()
        return loss.detach()

    return step


def model_and_loss(ours: MaskedAutoencoder, row: Row) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return the model of a row, with the weights of `ours`, and a function (images, noise) -> loss."""
    if row.model == "plain":
        assert row.attention != "eager"
        with DEVICE:
            plain = PlainMaskedAutoencoder(ours, row.attention)
        return plain, lambda images, noise: plain(images, noise).loss
    if row.model == "transformers":
        assert row.attention != "manual"
        theirs = transformers_model(ours, row.attention)
        return theirs, lambda images, noise: theirs(images, noise=noise).loss
    checkpoint_activations(ours, row.checkpointing)
    if row.compiled:
        compile_blocks(ours)
    if row.all_patches:
        return ours, lambda images, noise: loss_after_all(ours, images, noise)
    return ours, lambda images, noise: ours(images, noise).loss


def loss_after_all(model: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Return the usual loss, but predict all patches for it."""
    ids = model.mask(noise).ids_hidden
    return model.loss(take(patchify(images, model.patch_size), ids), take(model.predict_all(images, noise), ids))


def build_adamw(model: nn.Module, row: Row) -> Optimizer:
    if row.model == "transformers":
        return AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    groups = parameter_groups(model, WEIGHT_DECAY)
    if row.plain_update:
        return AdamW(groups, lr=LR, betas=OptimSettings().betas)
    optimizer = build_optimizer(groups, OptimSettings(), DEVICE)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


# Measuring.


def time_rows(case: Case, names: Sequence[str] | None, rounds: int) -> list[Result]:
    """Time the rows in turn, in random order, each with its own model; plain, their reference, is the first result."""
    results: dict[str, Result] = {}
    steps: dict[str, Step] = {}
    for name, row in rows_of(case, names).items():
        flops = autoencoder_flops(settings_of(case, row), (case.side, case.side), CHANNELS).training
        results[name] = result = Result(case.name, name, case.batch, flops)
        try:
            before = memory_from_here()
            step = build_step(case, row, case.batch)
            result.loss = step().item()
            timed(step, WARM_UP)
            steps[name] = step
        except torch.OutOfMemoryError as error:
            result.error = str(error).split(".")[0]
            continue
        if GPU and case.batch == case.memory_batch:
            result.memory = memory_at_peak() - before
    for seed in range(rounds):
        for name in random.Random(seed).sample(list(steps), len(steps)):  # noqa: S311 (no secret)
            results[name].times.append(timed(steps[name], STEPS_AT_ONCE))
    return list(results.values())


def timed(step: Step, count: int) -> Times:
    """Return the times of one step, averaged over `count` steps with one wait at their end."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    synchronize()
    return Times((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)


def peak_memory(case: Case, name: str, batch: int) -> int:
    """Return the bytes that a step needs at its peak, including weights and AdamW's moments."""
    before = memory_from_here()
    step = build_step(case, ROWS[name], batch)
    step(1)  # creates the moments
    step()
    return memory_at_peak() - before


def memory_from_here() -> int:
    """Reset the peak, and return the bytes in use."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def memory_at_peak() -> int:
    return torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")


def resident(what: str) -> int:
    """Return one of the kernel's counts of bytes for this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{what}:")


def largest_batches(case: Case) -> dict[str, int]:
    """Return how many images fit on the GPU: the case's batch, doubled while it fits; 0 if it does not fit at all."""
    found = dict.fromkeys(LARGEST_BATCH_ROWS, 0)
    for name in found:
        batch = case.batch
        with contextlib.suppress(torch.OutOfMemoryError):
            while batch <= LARGEST_BATCH:
                peak_memory(case, name, batch)
                found[name], batch = batch, 2 * batch
    return found


def end_to_end(case: Case) -> dict[str, float]:
    """Return medians of what `mae pretrain` logs on JPEG shards, with one worker per core, except one core."""
    # Imported here: `data` needs the loaders of other projects, which nothing else in this file needs.
    from data import photos_or_noise, repeated, write_shards  # noqa: PLC0415

    from mae.pipelines.pretrain import main as pretrain  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as name:
        photos, _ = photos_or_noise()
        write_shards(Path(name) / "shards", repeated(photos, E2E_IMAGES), 8)
        settings, workers = case.settings(), max(1, len(os.sched_getaffinity(0)) - 1)
        pretrain([
            "--run_dir", f"{name}/run", "--data.shards", f"{name}/shards/*.tar", "--data.workers", str(workers),
            "--data.cache_dir", f"{name}/cache", "--data.image_size", str(case.side), "--model.size", case.size,
            "--model.patch_size", str(case.patch), "--model.decoder_width", str(settings.decoder_shape.width),
            "--model.decoder_depth", str(settings.decoder_shape.depth),
            "--model.decoder_heads", str(settings.decoder_shape.heads), "--batch_size", str(case.batch),
            "--epochs", str(E2E_STEPS * case.batch / E2E_IMAGES), "--optim.warmup_epochs", "0",
            "--log_every", str(E2E_LOG_EVERY),
        ])  # fmt: skip
        lines = map(json.loads, (Path(name) / "run" / "metrics.jsonl").read_text().splitlines())
        warm = [line for line in lines if line["kind"] == "train"][1:]
    return {what: statistics.median(line[what] for line in warm) for what in ("images_per_second", "data_wait")} | {
        "workers": workers
    }


def apart(work: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of `work` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# The tables.


def measure(case: Case, options: argparse.Namespace) -> list[Result]:
    """Measure the chosen rows of a case."""
    results: list[Result] = apart(time_rows, case, options.row, options.rounds)
    if options.memory and not GPU:
        # Freed memory is returned at once; otherwise the peak would include what malloc keeps.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        for result in results:
            result.memory = apart(peak_memory, case, result.row, case.memory_batch)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return results


def cells(case: Case, result: Result, plain: Result) -> dict[str, str]:
    """Return the cells of a row by column title; unknown figures are left out."""
    found = {f"{case.name}, {case.batch} images": result.row}
    if result.error:
        return found | {"loss": result.error}
    seconds = statistics.median(result.seconds())
    found["ms" if GPU else "CPU ms"] = f"{1000 * seconds:.0f}"
    if not GPU:
        found["wall ms"] = f"{1000 * statistics.median(times.wall for times in result.times):.0f}"
    found["images/s"] = f"{result.batch / seconds:.1f}"
    if not plain.error:
        ratios = [theirs / own for theirs, own in zip(plain.seconds(), result.seconds(), strict=True)]
        found["x plain"] = f"{statistics.median(ratios):.2f}"
    if peak := peak_flops(DEVICE):
        found["MFU"] = f"{result.flops * result.batch / seconds / peak:.1%}"
    if result.memory and plain.memory:
        found[f"peak MB at {case.memory_batch}"] = f"{result.memory / 1e6:,.0f}"
        found["share of plain's"] = f"{result.memory / plain.memory:.2f}"
    if not plain.error and not ROWS[result.row].changed:
        difference = abs(result.loss / plain.loss - 1)
        found["loss"] = f"{difference:.0e}" if difference else "0"
    return found


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table in Markdown; the first column is text, the others numbers."""
    titles = list({title: None for row in rows for title in row})
    lines = [
        titles,
        ["---", *("---:" for _ in titles[1:])],
        *([row.get(title, "") for title in titles] for row in rows),
    ]
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def machine(threads: int) -> str:
    name = torch.cuda.get_device_name() if GPU else f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"
    return f"torch {torch.__version__}, transformers {version('transformers')}, {name}, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="only this model; can be repeated")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this row and plain; can be repeated")
    parser.add_argument("--rounds", type=int, default=5 if GPU else 9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="measure only time")
    parser.add_argument("--json", type=Path, help="file to which all figures are written")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    cases = [CASES[name] for name in options.case or CASES]
    found: dict[str, Any] = {"machine": machine(options.threads), "results": []}
    print(found["machine"])
    for case in cases:
        results = measure(case, options)
        print_table([cells(case, result, results[0]) for result in results])
        found["results"] += map(asdict, results)
        write(found, options.json)
    for what, work in (("from JPEG shards", end_to_end), ("largest batch", largest_batches)):
        for case in cases if GPU else []:
            found[f"{case.name}, {what}"] = figures = apart(work, case)
            print(f"\n{case.name}, {what}: {', '.join(f'{name} {figure:g}' for name, figure in figures.items())}")
            write(found, options.json)


def write(found: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
