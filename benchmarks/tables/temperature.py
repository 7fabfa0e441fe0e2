"""Temperatures of the positions on scanned digits, measured on the 200 validation images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables.table import Figures, Row, Table, accuracy, evaluated, logged, markdown_table, percent

SEEDS = (0, 1, 2)
TEMPERATURES = (10, 30, 100, 10_000)
_TRAIN, _VAL = "OUT/shards/train-*.tar", "OUT/shards/val-*.tar"


def row(temperature: int) -> Row:
    """Return the row of a temperature: three models, each judged as it is and fine-tuned with 10 labels per class."""
    runs = [f"OUT/{temperature}-seed-{seed}" for seed in SEEDS]
    commands = [
        f"mae pretrain --config configs/pretrain/digits.yaml --model.position_temperature {temperature} "
        f"--seed {seed} --data.shards '{_TRAIN}' --evaluation.eval_shards '{_VAL}' "
        f"--evaluation.train_shards '{_TRAIN}' --run_dir {run}"
        for seed, run in zip(SEEDS, runs, strict=True)
    ]
    commands += [
        f"mae evaluate {run} --data.shards '{_TRAIN}' --eval_shards '{_VAL}' --data.workers 0 --seeds 3 "
        "--protocols knn linear few_shot"
        for run in runs
    ]
    commands += [
        f"mae finetune --config configs/finetune/digits.yaml --model.position_temperature {temperature} --epochs 100 "
        f"--labels_per_class 10 --init {init} --seed {seed} --data.shards '{_TRAIN}' --eval_shards '{_VAL}' "
        f"--run_dir {run}-{name}"
        for seed, run in zip(SEEDS, runs, strict=True)
        for name, init in (("tuned", run), ("scratch", "none"))
    ]
    names = [run.removeprefix("OUT/") for run in runs]
    return Row(f"{temperature:,}", tuple(commands), lambda out: read(out, names))


def read(out: Path, names: list[str]) -> Figures:
    """Return a figure per model, for each column."""
    judged = [evaluated(f"{name}/evaluation")(out) for name in names]
    return {
        "loss": [logged(out / name, "evaluation")[-1]["loss"] for name in names],
        **{protocol: [each[protocol]["top1"] for each in judged] for protocol in ("knn", "linear", "few_shot")},
        "tuned": [accuracy(out / f"{name}-tuned") for name in names],
        "scratch": [accuracy(out / f"{name}-scratch") for name in names],
    }


def markdown(found: Mapping[str, Figures]) -> str:
    """Return the table: the loss of each model, and means over the models in percent."""
    rows = []
    for name, about in found.items():
        figures: Mapping[str, Any] = about["figures"]
        flat = {
            column: [value for each in figures[column] for value in each] for column in ("knn", "linear", "few_shot")
        }
        cells = [percent(values) for values in (*flat.values(), figures["tuned"], figures["scratch"])]
        rows.append([name, ", ".join(f"{loss:.3f}" for loss in figures["loss"]), *cells])
    header = ("temperature", "held-out loss", "k-NN", "linear probe", "10 labels per class", "fine-tuned, 10 labels")
    return markdown_table((*header, "from scratch, 10 labels"), rows)


TABLE = Table("temperature", tuple(map(row, TEMPERATURES)), markdown, prepare=("mae pack digits --out OUT/shards",))
