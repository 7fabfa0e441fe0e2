"""Report of a run, made from the files of its folder."""

import statistics
from typing import Any

import torch

from mae.files import write_atomically
from mae.report import page
from mae.report.curves import draw_accuracy, draw_training
from mae.settings import flatten, to_dict
from mae.tasks.baselines import describe, logged_baselines
from mae.training.progress import duration
from mae.training.run_folder.folder import RunFolder


def write_pretrain_report(folder: RunFolder, settings: Any, device: torch.device) -> None:
    """Write the report of a pretraining: losses, reconstructions, timings, settings and environment."""
    records = folder.metrics()
    pictures = sorted(folder.pictures.glob("step-*.png"))
    shown = [pictures[0], pictures[-1]] if len(pictures) > 1 else pictures
    sections = [
        (
            "Training",
            _training(records)
            + _baselines(records, settings.model.norm_pix_loss)
            + page.picture(draw_training(records), "Training curves"),
        ),
        (
            "Reconstructions",
            "".join(page.picture(path.read_bytes(), f"Reconstructions at {path.stem}") for path in shown),
        ),
        *_common(settings, device),
    ]
    _write(folder, f"Pretraining {folder.path.name}", sections)


def write_finetune_report(folder: RunFolder, settings: Any, device: torch.device) -> None:
    """Write the report of a fine-tuning: accuracies, losses, timings, settings and environment."""
    records = folder.metrics()
    evaluations = [record for record in records if record["kind"] == "eval"]
    rows = [(f"{r['epoch']:g}", f"{r['accuracy']:.2%}", f"{r['loss']:.4f}", f"{r['samples']:,}") for r in evaluations]
    accuracy = page.table(("epoch", "accuracy", "loss", "samples"), rows[-10:])
    sections = [
        ("Accuracy", accuracy + page.picture(draw_accuracy(records), "Accuracy after each evaluated epoch")),
        ("Training", _training(records) + page.picture(draw_training(records), "Training curves")),
        *_common(settings, device),
    ]
    _write(folder, f"Fine-tuning {folder.path.name}", sections)


def _baselines(records: list[dict[str, Any]], norm_pix_loss: bool) -> str:
    found = logged_baselines(records)
    return "" if found is None else page.paragraph(describe(found, norm_pix_loss).capitalize() + ".")


def _training(records: list[dict[str, Any]]) -> str:
    train = [record for record in records if record["kind"] == "train"]
    last = train[-1]
    progress = (
        f"{last['epoch']:.1f}",
        f"{last['step']:,}",
        "not finite" if last["loss"] is None else f"{last['loss']:.4f}",
        duration(last["seconds"]),
    )
    speed = (
        f"{_median(train, 'images_per_second'):,.0f}",
        f"{_median(train, 'step_seconds'):.3g}",
        f"{_median(train, 'data_wait'):.1%}",
        f"{_median(train, 'tflops'):.3g}",
        f"{_median(train, 'mfu'):.1%}" if "mfu" in last else "unknown peak of this device",
        f"{max(record['peak_memory'] for record in train) / 2**30:.2f}",
    )
    return page.table(("epochs", "steps", "final loss", "time of the last start"), [progress]) + page.table(
        ("images per second", "seconds per step", "waiting for data", "TFLOP/s per device", "MFU", "peak memory [GiB]"),
        [speed],
    )


def _median(records: list[dict[str, Any]], name: str) -> float:
    median: float = statistics.median(record[name] for record in records if name in record)
    return median


def _common(settings: Any, device: torch.device) -> list[tuple[str, str]]:
    return [
        ("Settings", page.settings_table(flatten(to_dict(settings)))),
        ("Environment", page.environment_table(device)),
    ]


def _write(folder: RunFolder, title: str, sections: list[tuple[str, str]]) -> None:
    write_atomically(folder.report, page.page(title, sections).encode())
