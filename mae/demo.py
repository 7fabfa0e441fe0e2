"""`mae demo`: all stages on scikit-learn's scanned digits, with the ordinary commands and the shipped settings.

The digits are packed, a model is pretrained without labels, fine-tuned with few labels and compared over several seeds
with the same model from scratch, with probes of frozen encoders and with the pixels; it is exported and loaded back.
The results are a table and an HTML page in one file.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar, NamedTuple

import timm
import torch
from rich.console import Console
from rich.table import Table

from mae import cli
from mae.data.packing.digits import SPLITS
from mae.errors import UserError, one_line_errors
from mae.evaluation.few_labels import frozen_cells
from mae.evaluation.seeds import Cell, table_of
from mae.files import write_atomically
from mae.inference.model import load
from mae.output import say
from mae.processes import default_workers
from mae.progress import duration
from mae.report.demo import demo_page
from mae.settings import check, parse
from mae.training.run_folder.folder import REPORT_FILE, RunFolder
from mae.training.settings import SCRATCH


class Column(NamedTuple):
    """Number of labels and of epochs; all columns have the same batch size, so fewer labels take more epochs."""

    name: str
    labels_per_class: int | None
    epochs: int


COLUMNS = (
    Column("5 labels per class", 5, 200),
    Column("10 labels per class", 10, 100),
    Column("all labels", None, 20),
)
PRETRAINED, FROM_SCRATCH = "pretrained", "from scratch"


@dataclass(frozen=True)
class DemoSettings:
    """Run all stages on scikit-learn's scanned digits: 8x8 images, two CPU cores, about three minutes."""

    EXAMPLE: ClassVar = "mae demo --out demo"

    out: Path = Path("demo")
    """New folder for the shards, the runs and the report."""
    seeds: int = 3
    """Number of fine-tuning runs per cell of the table; the seed chooses the labels and the weights of the head."""
    eval_split: str = "test"
    """Split on which accuracy is measured, val or test; the settings were chosen on val."""

    def __post_init__(self) -> None:
        check(self.seeds >= 1, "seeds", self.seeds, "1 or more")
        check(self.eval_split in ("val", "test"), "eval_split", self.eval_split, "val or test")


class _Run(NamedTuple):
    """Fine-tuning run."""

    run_dir: Path
    words: list[str]


def run(settings: DemoSettings) -> Path:
    """Run all stages and return the path of the report."""
    out, seconds = settings.out, dict[str, float]()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; remove it, or give a new one with --out")
    shards, pretrained, encoder = out / "shards", RunFolder(out / "pretrain"), out / "encoder"
    with _timed("pack", seconds):
        command("pack", ["digits", "--out", str(shards)])
    with _timed("pretrain", seconds):
        command("pretrain", ["--data.shards", str(shards / "train-*.tar"), "--run_dir", str(pretrained.path)])
    with _timed("fine-tune", seconds):
        cells, first = _finetune(settings, pretrained.path)
    with _timed("judge without fine-tuning", seconds):
        cells += _frozen(settings, pretrained.path)
    with _timed("export", seconds):
        command("export", [str(pretrained.path), "--out", str(encoder)])
        features = _feature_shape(encoder)
    results = {"split": settings.eval_split, "seconds": seconds, "cells": list(map(asdict, cells))}
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    report = out / REPORT_FILE
    page = demo_page(SPLITS, settings.eval_split, pretrained, first, cells, seconds, features)
    write_atomically(report, page.encode())
    _print_table(cells, settings)
    sys.stdout.write(f"done in {duration(sum(seconds.values()))}; report: {report.resolve()}\n")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae demo`."""
    with one_line_errors():
        run(parse(DemoSettings, sys.argv[1:] if argv is None else argv, prog="mae demo"))


def command(name: str, words: list[str]) -> None:
    """Print and run `mae NAME`, with the shipped settings for the digits if there are any."""
    with as_file(files("mae.configs") / name / "digits.yaml") as config:
        everything = [name, *(["--config", str(config)] if config.exists() else []), *words]
        say(f"$ mae {shlex.join(everything)}")
        cli.main(everything)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the time of a stage to `seconds`."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _finetune(settings: DemoSettings, pretrained: Path) -> tuple[list[Cell], RunFolder]:
    """Fill every cell of the table; also return the first run.

    These models are too small to use two cores each, so several runs go in parallel.
    """
    inits = {PRETRAINED: str(pretrained), FROM_SCRATCH: SCRATCH}
    cells = [(column, encoder) for column in COLUMNS for encoder in inits]
    runs = [
        _finetuning(settings, column, encoder, inits[encoder], seed)
        for column, encoder in cells
        for seed in range(settings.seeds)
    ]
    workers = min(default_workers(), len(runs))
    accuracies: list[float] = []
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for one, accuracy in zip(runs, pool.map(_accuracy, runs), strict=True):
            say(f"fine-tuned {len(accuracies) + 1}/{len(runs)} {one.run_dir}: accuracy {accuracy:.1%}")
            accuracies.append(accuracy)
    per_cell = [tuple(accuracies[at : at + settings.seeds]) for at in range(0, len(runs), settings.seeds)]
    rows = [(column.name, f"fine-tuned: {encoder}") for column, encoder in cells]
    filled = [Cell(row, column, of) for (column, row), of in zip(rows, per_cell, strict=True)]
    return filled, RunFolder(runs[0].run_dir)


def _frozen(settings: DemoSettings, pretrained: Path) -> list[Cell]:
    """Fill the rows of what is not fine-tuned, with the labels that fine-tuning has for each seed."""
    train, test = ((str(settings.out / "shards" / f"{split}-*.tar"),) for split in ("train", settings.eval_split))
    labels = {column.name: column.labels_per_class for column in COLUMNS}
    return frozen_cells(load(pretrained, "cpu"), train, test, labels, settings.seeds)


def _finetuning(settings: DemoSettings, column: Column, encoder: str, init: str, seed: int) -> _Run:
    run_dir = settings.out / "finetune" / f"{column.name} {encoder} seed {seed}".replace(" ", "-")
    shards = settings.out / "shards"
    words = ["--init", init, "--seed", str(seed), "--run_dir", str(run_dir)]
    words += ["--data.shards", str(shards / "train-*.tar"), "--epochs", str(column.epochs)]
    words += ["--eval_shards", str(shards / f"{settings.eval_split}-*.tar")]
    if column.labels_per_class is not None:
        words += ["--labels_per_class", str(column.labels_per_class)]
    return _Run(run_dir, words)


def _accuracy(one: _Run) -> float:
    """Fine-tune, with the output in a file beside the run, and return the final accuracy."""
    log = one.run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, redirect_stdout(file):
        command("finetune", one.words)
    evaluations = [record for record in RunFolder(one.run_dir).metrics() if record["kind"] == "eval"]
    return float(evaluations[-1]["accuracy"])


def _feature_shape(exported: Path) -> list[int]:
    """Load the export with timm, and return the shape of the features of one image."""
    encoder = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.no_grad():
        return list(encoder(torch.zeros(1, *encoder.pretrained_cfg["input_size"])).shape)


def _print_table(cells: Sequence[Cell], settings: DemoSettings) -> None:
    header, rows = table_of(cells)
    title = f"accuracy on {SPLITS[settings.eval_split]} held-out digits, mean ± std over {settings.seeds} seeds"
    table = Table(title=f"\n{title}")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=100).print(table)
