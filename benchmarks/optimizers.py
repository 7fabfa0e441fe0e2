"""Muon beside AdamW on scikit-learn's scanned digits: pretraining x fine-tuning, over several seeds.

`python benchmarks/optimizers.py --out FOLDER [--epochs N] [--tuning_epochs N] [--seeds N]`

Every run has the settings of `mae demo`, 5 labels per class, one thread, and the same data order for both optimisers.
The learning rates are chosen on the 200 validation images, each optimiser from the same factors times the shipped rate:
that of pretraining by fine-tuning with AdamW, then that of fine-tuning after a pretraining with AdamW. The table is
measured on the 500 test images, which nothing was chosen on, and written to FOLDER/results.json; `benchmarks/results.py
optimizers` makes the table of docs/results.md from it. Start the same command again to resume.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from mae.demo import command
from mae.files import write_atomically
from mae.training.run_folder.folder import RunFolder

OPTIMIZERS = ("adamw", "muon")
FACTORS = (0.3, 1.0, 3.0)
PRETRAINING_LR, TUNING_LR = 2e-3, 1e-2  # of configs/pretrain/digits.yaml and configs/finetune/digits.yaml
WARMUP = 1 / 15  # share of a run
LABELS_PER_CLASS, WORKERS = 5, 2


class Rates(NamedTuple):
    """An optimiser and its base learning rate."""

    optimizer: str
    base_lr: float

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.base_lr:g}"

    def flags(self, epochs: int) -> list[str]:
        return [
            "--optim.name", self.optimizer, "--optim.base_lr", str(self.base_lr),
            "--epochs", str(epochs), "--optim.warmup_epochs", str(epochs * WARMUP),
        ]  # fmt: skip


class Run(NamedTuple):
    """One `mae pretrain` or `mae finetune`."""

    stage: str
    folder: Path
    words: list[str]


class Plan(NamedTuple):
    """Runs in one folder."""

    out: Path
    epochs: int
    tuning_epochs: int
    seeds: int

    def pretraining(self, rates: Rates, seed: int) -> Run:
        folder = self.out / "pretrain" / f"{rates}-seed-{seed}"
        words = ["--seed", str(seed), "--data.shards", str(self.out / "shards" / "train-*.tar")]
        return Run("pretrain", folder, words + rates.flags(self.epochs))

    def tuning(self, pretrained: Run, rates: Rates, seed: int, split: str) -> Run:
        folder = self.out / f"finetune-{split}" / f"{pretrained.folder.name}-{rates}-seed-{seed}"
        shards = self.out / "shards"
        words = [
            "--seed", str(seed), "--init", str(pretrained.folder), "--labels_per_class", str(LABELS_PER_CLASS),
            "--data.shards", str(shards / "train-*.tar"), "--eval_shards", str(shards / f"{split}-*.tar"),
        ]  # fmt: skip
        return Run("finetune", folder, words + rates.flags(self.tuning_epochs))


def train(one: Run) -> float:
    """Do one run, with its output in a file beside it; return the last accuracy, 0 for a pretraining."""
    log = one.folder.with_suffix(f"{one.folder.suffix}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file):
        command(one.stage, [*one.words, "--run_dir", str(one.folder)])
    accuracies = [record["accuracy"] for record in RunFolder(one.folder).metrics() if record["kind"] == "eval"]
    return float(accuracies[-1]) if accuracies else 0.0


def train_all(runs: Sequence[Run]) -> list[float]:
    """Do several runs at a time: these models are too small to use two cores each."""
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(train, runs))


def best(of: Sequence[Rates], accuracies: Sequence[float], stage: str) -> dict[str, Rates]:
    """Return each optimiser's rates with the greatest mean accuracy over seeds; print all of them."""
    each = len(accuracies) // len(of)
    means = {rates: statistics.mean(accuracies[at * each : (at + 1) * each]) for at, rates in enumerate(of)}
    for rates, mean in means.items():
        print(f"{stage} {rates}: {mean:.1%} on val", flush=True)
    return {name: max((r for r in of if r.optimizer == name), key=lambda r: means[r]) for name in OPTIMIZERS}


def choose(plan: Plan) -> tuple[dict[str, Rates], dict[str, Rates]]:
    """Return each optimiser's learning rates for pretraining and for fine-tuning, chosen on val."""
    seeds, shipped = range(plan.seeds), Rates("adamw", TUNING_LR)
    rates = [Rates(name, factor * PRETRAINING_LR) for name in OPTIMIZERS for factor in FACTORS]
    first = [plan.pretraining(each, 0) for each in rates]
    train_all(first)
    runs = [plan.tuning(pretrained, shipped, seed, "val") for pretrained in first for seed in seeds]
    for_pretraining = best(rates, train_all(runs), "pretraining")
    start = plan.pretraining(for_pretraining["adamw"], 0)
    rates = [Rates(name, factor * TUNING_LR) for name in OPTIMIZERS for factor in FACTORS]
    runs = [plan.tuning(start, each, seed, "val") for each in rates for seed in seeds]
    return for_pretraining, best(rates, train_all(runs), "fine-tuning")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100, help="of pretraining")
    parser.add_argument("--tuning_epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    plan = Plan(**vars(parser.parse_args()))
    if not (plan.out / "shards").exists():
        command("pack", ["digits", "--out", str(plan.out / "shards")])
    for_pretraining, for_tuning = choose(plan)
    pretrained = {
        name: [plan.pretraining(rates, seed) for seed in range(plan.seeds)] for name, rates in for_pretraining.items()
    }
    train_all([run for runs in pretrained.values() for run in runs])
    cells = [(one, two) for one in OPTIMIZERS for two in OPTIMIZERS]
    found = train_all(
        [
            plan.tuning(run, for_tuning[two], seed, "test")
            for one, two in cells
            for seed, run in enumerate(pretrained[one])
        ]
    )
    accuracies = iter(found)
    results = {
        "pretraining": for_pretraining,
        "fine-tuning": for_tuning,
        "accuracies": {
            one: {two: [next(accuracies) for _ in range(plan.seeds)] for two in OPTIMIZERS} for one in OPTIMIZERS
        },
    }
    write_atomically(plan.out / "results.json", json.dumps(results).encode())


if __name__ == "__main__":
    main()
