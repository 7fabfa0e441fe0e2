"""`mae demo`: the whole job on scikit-learn's scanned digits, by the ordinary pipelines and shipped settings.

Pack, pretrain without labels, fine-tune with few labels beside the same model from scratch over several
seeds, export, load back. It ends with a table and one self-contained page.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.resources import as_file, files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timm
import torch
from rich.console import Console
from rich.table import Table

from mae.data.packing.digits import SPLITS
from mae.errors import UserError, one_line_errors
from mae.files import write_atomically
from mae.pipelines import export, finetune, pack, pretrain
from mae.processes import default_workers
from mae.report import page
from mae.report.curves import draw_training
from mae.settings import check, flatten, load_yaml, parse
from mae.training.origin import SCRATCH
from mae.training.progress import duration
from mae.training.run_folder.folder import REPORT_FILE, SETTINGS_FILE, RunFolder

Schema = TypeVar("Schema")


class Column(NamedTuple):
    """One amount of labels and how long to train on it; batches are the same, so few labels take more epochs."""

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
    """Run the whole job on scikit-learn's scanned digits: 8x8 images, two CPU cores, about three minutes."""

    out: Path = Path("demo")
    """New folder for the shards, the runs and the report."""
    seeds: int = 3
    """Fine-tuning runs per cell of the table, each with other labels and other initial heads."""
    eval_split: str = "test"
    """Split on which accuracy is measured; the settings were chosen on val."""

    def __post_init__(self) -> None:
        check(self.seeds >= 1, "seeds", self.seeds, "1 or more")
        check(self.eval_split in ("val", "test"), "eval_split", self.eval_split, "val or test")


@dataclass(frozen=True)
class Cell:
    """Accuracies of one model on one amount of labels, a number per seed."""

    model: str
    column: str
    accuracies: tuple[float, ...]

    def __str__(self) -> str:
        mean = statistics.mean(self.accuracies)
        spread = statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0
        return f"{mean:.1%} ± {100 * spread:.1f}"


def run(settings: DemoSettings) -> Path:
    """Do it all; returns the path of the report."""
    out, clock = settings.out, _Clock()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; remove it, or give a new one with --out")
    shards = out / "shards"
    with clock.measure("pack"):
        pack.run(pack.PackSettings(pack.DIGITS, shards))
    with clock.measure("pretrain"):
        pretrained = pretrain.run(_pretrain_settings(shards, out / "pretrain"))
    with clock.measure("fine-tune"):
        cells = _finetune(settings, pretrained.path)
    with clock.measure("export"):
        exported = export.run(export.ExportSettings(pretrained.path, out=out / "encoder"))
        features = _feature_shape(exported)
    report = out / REPORT_FILE
    write_atomically(report, _report(settings, pretrained, cells, clock, exported, features).encode())
    _print_table(cells, settings)
    sys.stdout.write(f"done in {duration(sum(clock.seconds.values()))}; report: {report.resolve()}\n")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """`mae demo`."""
    with one_line_errors():
        run(parse(DemoSettings, sys.argv[1:] if argv is None else argv, prog="mae demo"))


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began


def _pretrain_settings(shards: Path, run_dir: Path) -> pretrain.PretrainSettings:
    flags = ["--data.shards", str(shards / "train-*.tar"), "--run_dir", str(run_dir)]
    return _from_shipped("pretrain", pretrain.PretrainSettings, flags)


def _finetune(settings: DemoSettings, pretrained: Path) -> list[Cell]:
    """Every cell of the table; these models are too small for two cores, so the runs share the cores instead."""
    inits = {PRETRAINED: str(pretrained), FROM_SCRATCH: SCRATCH}
    cells = [(column, model) for column in COLUMNS for model in inits]
    jobs = [
        _finetune_settings(settings, column, model, inits[model], seed)
        for column, model in cells
        for seed in range(settings.seeds)
    ]
    workers = min(default_workers(), len(jobs))
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        accuracies: list[float] = []
        for job, accuracy in zip(jobs, pool.map(_accuracy, jobs), strict=True):
            sys.stdout.write(f"fine-tuned {len(accuracies) + 1}/{len(jobs)} {job.run_dir}: accuracy {accuracy:.1%}\n")
            sys.stdout.flush()
            accuracies.append(accuracy)
    return [
        Cell(model, column.name, tuple(accuracies[settings.seeds * i : settings.seeds * (i + 1)]))
        for i, (column, model) in enumerate(cells)
    ]


def _accuracy(settings: finetune.FinetuneSettings) -> float:
    """Fine-tune in a process of its own, what it prints kept beside its run; the accuracy at the end."""
    log = settings.run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, redirect_stdout(file):
        folder = finetune.run(settings)
    evaluations = [record for record in folder.metrics() if record["kind"] == "eval"]
    return float(evaluations[-1]["accuracy"])


def _finetune_settings(
    settings: DemoSettings, column: Column, model: str, init: str, seed: int
) -> finetune.FinetuneSettings:
    name = f"{column.name} {model} seed {seed}".replace(" ", "-")
    shards = settings.out / "shards"
    flags = ["--init", init, "--seed", str(seed), "--run_dir", str(settings.out / "finetune" / name)]
    flags += ["--data.shards", str(shards / "train-*.tar"), "--epochs", str(column.epochs)]
    flags += ["--eval_shards", str(shards / f"{settings.eval_split}-*.tar")]
    if column.labels_per_class is not None:
        flags += ["--labels_per_class", str(column.labels_per_class)]
    return _from_shipped("finetune", finetune.FinetuneSettings, flags)


def _from_shipped(stage: str, schema: type[Schema], flags: list[str]) -> Schema:
    """The shipped settings of the digits, with `flags` over them."""
    with as_file(files("mae.configs") / stage / "digits.yaml") as config:
        return parse(schema, ["--config", str(config), *flags], prog=f"mae {stage}")


def _feature_shape(exported: Path) -> list[int]:
    """Load the export as any user of timm would, and take features of one image."""
    encoder = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.no_grad():
        return list(encoder(torch.zeros(1, *encoder.pretrained_cfg["input_size"])).shape)


def _print_table(cells: Sequence[Cell], settings: DemoSettings) -> None:
    table = Table(
        title=f"\naccuracy on {SPLITS[settings.eval_split]} held-out digits, mean ± deviation of {settings.seeds} seeds"
    )
    table.add_column("encoder")
    for column in COLUMNS:
        table.add_column(column.name, justify="right")
    for model in (PRETRAINED, FROM_SCRATCH):
        table.add_row(model, *(str(cell) for cell in cells if cell.model == model))
    Console(file=sys.stdout, width=100).print(table)


def _report(
    settings: DemoSettings,
    pretrained: RunFolder,
    cells: Sequence[Cell],
    clock: _Clock,
    exported: Path,
    features: list[int],
) -> str:
    rows = [(model, *(str(cell) for cell in cells if cell.model == model)) for model in (PRETRAINED, FROM_SCRATCH)]
    every = [(cell.column, cell.model, *(f"{accuracy:.1%}" for accuracy in cell.accuracies)) for cell in cells]
    first_finetuned = min(path for path in (settings.out / "finetune").iterdir() if path.is_dir())
    picture = sorted(pretrained.pictures.glob("step-*.png"))[-1]
    sections = [
        (
            "What was done",
            page.paragraph(
                f"{SPLITS['train']:,} scanned digits of 8x8 pixels were packed into shards; a masked autoencoder "
                "was pretrained on them without labels; its encoder was fine-tuned with an MLP head on its cls "
                "token, beside the same model from scratch under the same settings; the encoder was exported and "
                f"loaded back by timm, where an image gives features of shape {features}."
            ),
        ),
        (
            "Accuracy",
            page.paragraph(
                f"On {SPLITS[settings.eval_split]} digits of the {settings.eval_split} split, "
                f"mean ± standard deviation of {settings.seeds} seeds; a seed chooses the labels and the weights."
            )
            + page.table(("encoder", *(column.name for column in COLUMNS)), rows)
            + page.table(("labels", "encoder", *(f"seed {s}" for s in range(settings.seeds))), every),
        ),
        (
            "Reconstructions",
            page.picture(picture.read_bytes(), "Fixed images under fixed masks, end of pretraining"),
        ),
        ("Pretraining", page.picture(draw_training(pretrained.metrics()), "Training curves")),
        (
            "Time",
            page.table(("stage", "time"), [(stage, duration(s)) for stage, s in clock.seconds.items()]),
        ),
        ("Pretraining settings", page.settings_table(_settings_of(pretrained.path))),
        ("Fine-tuning settings, first run", page.settings_table(_settings_of(first_finetuned))),
        ("Environment", page.environment_table(torch.device("cpu"))),
    ]
    return page.page("mae demo: scanned digits", sections)


def _settings_of(run_dir: Path) -> dict[str, Any]:
    return flatten(load_yaml(run_dir / SETTINGS_FILE))
