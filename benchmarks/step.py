"""Speed and memory of a training step, compared with a plain implementation and `transformers`.

`python benchmarks/step.py [--case NAME]... [--row NAME]... [--rounds N] [--threads N] [--no-memory] [--json FILE]`

What a step is, and how the rows differ, is in `benchmarks/training_step.py`. *Loss* is the relative difference of the
first loss from plain's; rows without it compute something else: fewer patches, or another decoder.

Everything runs on the CPU; `benchmarks/gpu.py --stage step` measures a GPU. The rows take turns in random order. Times
are medians, and a ratio is the median of the ratios within each round. CPU time counts, which other programs change
less than wall time; both are shown. The peak memory is all that a step needs beyond its imports, in a separate process,
with a batch where activations dominate. Each table is printed, and written, as soon as it is ready.
"""

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from training_step import (
    CROSS,
    PRESET,
    QUARTER,
    Case,
    Row,
    Step,
    Times,
    build_step,
    flops_of,
    memory_at_peak,
    memory_from_here,
    timed,
)

DEVICE = torch.device("cpu")
WARM_UP = 2

CASES = {
    "64": Case("ViT-Ti/8, 64 px", "tiny", 32, 128, 64, 8, (None, None, None)),
    "ti": Case("ViT-Ti/16, 224 px", "tiny", 8, 32),
    "s": Case("ViT-S/16, 224 px", "small", 8, 32),
    "b": Case("ViT-B/16, 224 px", "base", 8, 64),
}
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
    "ours, compiled": Row(compiled="blocks"),
    "ours, a quarter predicted": Row(changed=QUARTER),
    "ours, cross, a quarter": Row(changed=CROSS),
    "ours, cross, a quarter, GELU recomputed": Row(changed=CROSS, checkpointing="gelu"),
    "ours, cross, a quarter, compiled": Row(changed=CROSS, compiled="blocks"),
    "ours, preset decoder": Row(changed=PRESET),
    "ours, preset decoder, cross, a quarter": Row(changed=CROSS | PRESET),
}


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


# What is measured.


def rows_of(case: Case, names: Sequence[str] | None) -> dict[str, Row]:
    """Return the named rows and plain, without the rows of the preset decoder if the case already has it."""
    same = replace(case.settings(), **PRESET).decoder_shape == case.settings().decoder_shape
    return {
        name: row
        for name, row in ROWS.items()
        if (name == REFERENCE or not names or name in names) and not (same and PRESET.keys() <= row.changed.keys())
    }


# Measuring.


def time_rows(case: Case, names: Sequence[str] | None, rounds: int) -> list[Result]:
    """Time the rows in turn, in random order, each with its own model; plain, their reference, is the first result."""
    results: dict[str, Result] = {}
    steps: dict[str, Step] = {}
    for name, row in rows_of(case, names).items():
        results[name] = result = Result(case.name, name, case.batch, flops_of(case, row))
        steps[name] = step = build_step(case, row, case.batch, DEVICE)
        result.loss = step().item()
        timed(step, WARM_UP, DEVICE)
    for seed in range(rounds):
        for name in random.Random(seed).sample(list(steps), len(steps)):  # noqa: S311 (no secret)
            results[name].times.append(timed(steps[name], 1, DEVICE))
    return list(results.values())


def peak_memory(case: Case, name: str, batch: int) -> int:
    """Return the bytes that a step needs at its peak, including weights and AdamW's moments."""
    before = memory_from_here(DEVICE)
    step = build_step(case, ROWS[name], batch, DEVICE)
    step(1)  # creates the moments
    step()
    return memory_at_peak(DEVICE) - before


def apart(work: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of `work` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# The tables.


def measure(case: Case, options: argparse.Namespace) -> list[Result]:
    """Measure the chosen rows of a case."""
    results: list[Result] = apart(time_rows, case, options.row, options.rounds)
    if options.memory:
        # Freed memory is returned at once; otherwise the peak would include what malloc keeps.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        for result in results:
            result.memory = apart(peak_memory, case, result.row, case.memory_batch)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return results


def cells(case: Case, result: Result, plain: Result) -> dict[str, str]:
    """Return the cells of a row by column title; unknown figures are left out."""
    found = {f"{case.name}, {case.batch} images": result.row}
    seconds = statistics.median(times.cpu for times in result.times)
    found["CPU ms"] = f"{1000 * seconds:.0f}"
    found["wall ms"] = f"{1000 * statistics.median(times.wall for times in result.times):.0f}"
    found["images/s"] = f"{result.batch / seconds:.1f}"
    ratios = [theirs.cpu / own.cpu for theirs, own in zip(plain.times, result.times, strict=True)]
    found["x plain"] = f"{statistics.median(ratios):.2f}"
    if result.memory and plain.memory:
        found[f"peak MB at {case.memory_batch}"] = f"{result.memory / 1e6:,.0f}"
        found["share of plain's"] = f"{result.memory / plain.memory:.2f}"
    if not ROWS[result.row].changed:
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
    name = f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"
    return f"torch {torch.__version__}, transformers {version('transformers')}, {name}, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="only this model; can be repeated")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this row and plain; can be repeated")
    parser.add_argument("--rounds", type=int, default=9)
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


def write(found: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
