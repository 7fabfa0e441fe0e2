"""The report of one run, made from what its folder holds."""

from typing import Any

import torch

from mae.files import write_atomically
from mae.report import page
from mae.report.curves import draw_accuracy, draw_training
from mae.settings import flatten, to_dict
from mae.training.progress import duration
from mae.training.run_folder import RunFolder


def write_pretrain_report(folder: RunFolder, settings: Any, device: torch.device) -> None:
    """Loss curve, reconstructions, timings, settings, environment."""
    records = folder.metrics()
    pictures = sorted(folder.pictures.glob("step-*.png"))
    shown = [pictures[0], pictures[-1]] if len(pictures) > 1 else pictures
    sections = [
        ("Training", _training(records) + page.picture(draw_training(records), "Training curves")),
        (
            "Reconstructions",
            "".join(page.picture(path.read_bytes(), f"Reconstructions at {path.stem}") for path in shown),
        ),
        *_common(settings, device),
    ]
    _write(folder, f"Pretraining {folder.path.name}", sections)


def write_finetune_report(folder: RunFolder, settings: Any, device: torch.device) -> None:
    """Accuracies, loss curve, timings, settings, environment."""
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


def _training(records: list[dict[str, Any]]) -> str:
    train = [record for record in records if record["kind"] == "train"]
    last = train[-1]
    speeds = sorted(record["images_per_second"] for record in train)
    return page.table(
        ("epochs", "steps", "final loss", "images per second (median)", "time of the last start"),
        [
            (
                f"{last['epoch']:.1f}",
                f"{last['step']:,}",
                "not finite" if last["loss"] is None else f"{last['loss']:.4f}",
                f"{speeds[len(speeds) // 2]:,.0f}",
                duration(last["seconds"]),
            )
        ],
    )


def _common(settings: Any, device: torch.device) -> list[tuple[str, str]]:
    return [
        ("Settings", page.settings_table(flatten(to_dict(settings)))),
        ("Environment", page.environment_table(device)),
    ]


def _write(folder: RunFolder, title: str, sections: list[tuple[str, str]]) -> None:
    write_atomically(folder.report, page.page(title, sections).encode())
