"""Report of a run, made from the files of its folder."""

import statistics
from contextlib import suppress
from typing import Any

import torch

from mae.evaluation.online import KIND
from mae.files import read_bounded, write_atomically
from mae.progress import duration
from mae.report import page
from mae.report.curves import draw_accuracy, draw_evaluations, draw_training
from mae.run_files import figures
from mae.settings import flatten, to_dict
from mae.tasks.baselines import Baselines, describe, logged_baselines
from mae.training.run_folder.folder import RunFolder

_TRAIN = ("epoch", "lr", "loss", "images_per_second", "step_seconds", "data_wait", "tflops", "peak_memory", "seconds")
_EVAL = ("epoch", "accuracy", "loss", "samples")
_ONLINE = ("epoch", "loss", "samples", "share_of_time")
_MOST_BYTES_OF_PICTURE = 1 << 26


def write_pretrain_report(folder: RunFolder, settings: Any, device: torch.device) -> None:
    """Write the report of a pretraining: losses, reconstructions, timings, settings and environment."""
    records = folder.metrics()
    train, baselines = figures(records, "train", *_TRAIN), logged_baselines(records)
    evaluations = figures(records, KIND, *_ONLINE)
    sections = [
        (
            "Training",
            _training(train)
            + _described(baselines, settings.model.norm_pix_loss)
            + page.picture(draw_training(train, baselines, evaluations), "Training curves"),
        ),
        *_online(evaluations),
        (
            "Reconstructions",
            "".join(page.picture(png, f"Reconstructions at {name}") for name, png in _first_and_last_picture(folder)),
        ),
        *_common(settings, device),
    ]
    _write(folder, f"Pretraining {folder.path.name}", sections)


def write_finetune_report(folder: RunFolder, settings: Any, device: torch.device) -> None:
    """Write the report of a fine-tuning: accuracies, losses, timings, settings and environment."""
    records = folder.metrics()
    train, evaluations = figures(records, "train", *_TRAIN), figures(records, "eval", *_EVAL)
    rows = [(f"{r['epoch']:g}", f"{r['accuracy']:.2%}", f"{r['loss']:.4f}", f"{r['samples']:,}") for r in evaluations]
    accuracy = page.table(("epoch", "accuracy", "loss", "samples"), rows[-10:])
    sections = [
        ("Accuracy", accuracy + page.picture(draw_accuracy(evaluations), "Accuracy after each evaluated epoch")),
        ("Training", _training(train) + page.picture(draw_training(train), "Training curves")),
        *_common(settings, device),
    ]
    _write(folder, f"Fine-tuning {folder.path.name}", sections)


def _online(evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the section of the evaluations while pretraining, if there were any: the last one, and the curves."""
    if not evaluations:
        return []
    known = [_only_numbers(record) for record in evaluations]
    last = known[-1]
    formats = {"loss": "{:.4f}", "knn": "{:.2%}", "few_shot": "{:.2%}", "rank": "{:.1f}"}
    row = [text.format(last[name]) if last.get(name) is not None else "none" for name, text in formats.items()]
    table = page.table(
        ("epoch", "held-out loss", "k-NN", "few-shot", "rank", "samples", "share of time"),
        [(f"{last['epoch']:.1f}", *row, f"{last['samples']:,}", f"{last['share_of_time']:.1%}")],
    )
    curves = page.picture(draw_evaluations(known, last["epoch"]), "Accuracies and rank of the features")
    return [("Evaluation while pretraining", table + curves)]


def _only_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without figures that are no numbers, since anybody could have written it."""
    return {name: value for name, value in record.items() if figures([record], record["kind"], name)}


def _described(baselines: Baselines | None, norm_pix_loss: bool) -> str:
    return "" if baselines is None else page.paragraph(describe(baselines, norm_pix_loss).capitalize() + ".")


def _first_and_last_picture(folder: RunFolder) -> list[tuple[str, bytes]]:
    """Return name and PNG file of the first and the last picture, of those that can be read."""
    found = sorted(folder.pictures.glob("step-*.png"))
    shown = []
    for path in dict.fromkeys(found[:1] + found[-1:]):
        with suppress(OSError):
            shown.append((path.stem, read_bounded(path, _MOST_BYTES_OF_PICTURE)))
    return shown


def _training(train: list[dict[str, Any]]) -> str:
    if not train:
        return page.paragraph("The log of the training is lost.")
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
        f"{_median(train, 'mfu'):.1%}" if figures(train[-1:], "train", "mfu") else "unknown peak of this device",
        f"{max(record['peak_memory'] for record in train) / 2**30:.2f}",
    )
    return page.table(("epochs", "steps", "final loss", "time of the last start"), [progress]) + page.table(
        ("images per second", "seconds per step", "waiting for data", "TFLOP/s per device", "MFU", "peak memory [GiB]"),
        [speed],
    )


def _median(records: list[dict[str, Any]], name: str) -> float:
    median: float = statistics.median(record[name] for record in figures(records, "train", name))
    return median


def _common(settings: Any, device: torch.device) -> list[tuple[str, str]]:
    return [
        ("Settings", page.settings_table(flatten(to_dict(settings)))),
        ("Environment", page.environment_table(device)),
    ]


def _write(folder: RunFolder, title: str, sections: list[tuple[str, str]]) -> None:
    write_atomically(folder.report, page.page(title, sections).encode())
