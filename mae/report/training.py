"""Curves and key figures of one run, or of several over each other."""

import html
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mae.output import counted
from mae.progress import duration
from mae.report import page
from mae.report.charts import Format, Level, Line, brief, chart, figure, percent
from mae.report.finding import loss_in_words
from mae.report.newest import data_wait, newest_loss, newest_start
from mae.report.reading import FINETUNING, MODEL_ONLY, PRETRAINING, RunFiles

_SAME_BASELINE = 0.02
_STAGES = (PRETRAINING, FINETUNING)


class _Drawn(NamedTuple):
    """Run with its name and its colour in all charts."""

    run: RunFiles
    name: str
    color: int


def training_charts(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return the charts of loss, learning rate, speed and wait for data; a sentence without any line of the log.

    Pretraining and fine-tuning have charts of their own, as their losses and epochs cannot be compared.
    """
    every = _drawn(runs, names)
    stages = {stage: [each for each in every if each.run.kind == stage and each.run.train] for stage in _STAGES}
    known = {stage: drawn for stage, drawn in stages.items() if drawn}
    if not known:
        return "<p>The log of the training is lost, or training has not begun.</p>"
    return "".join(
        (page.subheading(stage.capitalize()) if len(known) > 1 else "") + _charts_of_stage(drawn, len(runs) > 1)
        for stage, drawn in known.items()
    )


def _drawn(runs: Sequence[RunFiles], names: Sequence[str]) -> list[_Drawn]:
    return [_Drawn(run, name, color) for color, (run, name) in enumerate(zip(runs, names, strict=True))]


def _charts_of_stage(drawn: Sequence[_Drawn], several: bool) -> str:
    parts = _losses_of_several(drawn) if several else [_losses_of_one(drawn[0].run)]
    for title, name, form in (
        ("Learning rate", "lr", figure),
        ("Images per second", "images_per_second", figure),
        ("Share of time spent waiting for data", "data_wait", percent),
    ):
        lines = [_line(name_of, run.train, name, color) for run, name_of, color in drawn]
        parts.append(chart(title, lines, (), form, from_zero=True, is_named=several))
    return f'<div class="charts">{"".join(parts)}</div>'


def _losses_of_one(run: RunFiles) -> str:
    mixes = ("regularization.mixup", "regularization.cutmix")
    added = ["label smoothing"] if run.number("regularization.label_smoothing") else []
    added += ["mixed images"] if any(run.number(name) for name in mixes) else []
    loss = _line("training loss" + (f", with {' and '.join(added)}" if added else ""), run.train, "loss", 0)
    if not (held_out := _held_out(run)):
        return chart("Training loss", [loss], _levels([run]), is_named=bool(added))
    lines = [loss, _line("validation loss", held_out, "loss", 1)]
    return chart("Training and validation loss", lines, _levels([run]))


def _losses_of_several(drawn: Sequence[_Drawn]) -> list[str]:
    """Return charts of the losses, with losses of one kind in each."""
    kinds = list(dict.fromkeys(_target(run) for run, _, _ in drawn))
    parts = []
    for kind in kinds:
        same = [each for each in drawn if _target(each.run) == kind]
        suffix = f" ({kind})" if len(kinds) > 1 else ""
        training = [_line(name, run.train, "loss", color) for run, name, color in same]
        held_out = [_line(name, _held_out(run), "loss", color) for run, name, color in same]
        parts.append(chart(f"Training loss{suffix}", training, _levels([each.run for each in same]), is_named=True))
        parts.append(chart(f"Validation loss{suffix}", held_out, is_named=True))
    return parts


def _target(run: RunFiles) -> str:
    """Return what a model is trained to predict: losses of different targets cannot be compared."""
    if run.kind == FINETUNING:
        return "classes"
    return "normalised pixels" if run.settings.get("model.norm_pix_loss", True) else "plain pixels"


def evaluation_charts(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return the charts of the accuracies and the rank that were measured during the runs; empty without any."""
    several = len(runs) > 1
    if several:
        parts = []
    else:
        frozen = (("nearest neighbours (k-NN)", "knn"), ("few labels (few-shot probe)", "few_shot"))
        both = [_line(title, runs[0].evaluations, name, color) for color, (title, name) in enumerate(frozen)]
        parts = [chart("Accuracy of frozen features", [line for line in both if line.xs], (), percent)]
    wanted: tuple[tuple[str, str, Format], ...] = (
        ("Accuracy of the classifier", "accuracy", percent),
        ("Accuracy of nearest neighbours (k-NN)", "knn", percent),
        ("Accuracy with few labels (few-shot probe)", "few_shot", percent),
        ("Rank of the features (RankMe)", "rank", figure),
    )
    for title, name, form in wanted if several else (wanted[0], wanted[3]):
        lines = [_line(name_of, run.evaluations, name, color) for run, name_of, color in _drawn(runs, names)]
        parts.append(chart(title, lines, (), form, is_named=several))
    charts = "".join(parts)
    return charts and f'<div class="charts">{charts}</div>'


def status(run: RunFiles) -> tuple[str, str]:
    """Return in a word how the run stands, and how much that matters: a class of the page's style."""
    reason = run.ending.get("reason")
    known = {"finished": ("finished", "good"), "preempted": ("interrupted", "warning"), "error": ("failed", "problem")}
    if reason in known:
        return known[reason]
    if run.kind == MODEL_ONLY:
        return "model only", "note"
    if not run.train:
        return "not begun", "note"
    return ("running", "note") if run.is_running else ("unfinished", "warning")


def tiles(run: RunFiles) -> str:
    """Return the key figures of a run."""
    shown = [(name, value, note) for name, value, note in key_figures(run) if value]
    body = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in shown
    )
    return f'<dl class="tiles">{body}</dl>' if body else ""


def key_figures(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return name, value and a remark of each key figure; the value is empty where it is not known."""
    loss, wait = newest_loss(run), data_wait(run)
    last: dict[str, Any] = run.train[-1] if run.train else {}
    online: dict[str, Any] = run.online[-1] if run.online else {}
    accuracy = max((record["accuracy"] for record in run.accuracies), default=None)
    total, start = run.total, newest_start(run.train)
    speed = statistics.median(record["images_per_second"] for record in start) if start else None
    peak = max((record["peak_memory"] for record in run.train), default=None)
    epochs = run.number("epochs")
    known_held_out = [record["loss"] for record in _held_out(run)]
    return [
        ("training loss", "" if loss is None else loss_in_words(loss), ""),
        ("validation loss", loss_in_words(known_held_out[-1]) if known_held_out else "", ""),
        ("best accuracy", "" if accuracy is None else percent(accuracy), ""),
        ("k-NN accuracy", percent(online["knn"]) if online.get("knn") is not None else "", ""),
        ("few-shot accuracy", percent(online["few_shot"]) if online.get("few_shot") is not None else "", ""),
        ("epochs", brief(last["epoch"]) if last else "", f"of {brief(epochs)}" if last and epochs else ""),
        ("steps", f"{last['step']:,}" if last else "", f"of {total:,}" if total else ""),
        ("images per second", "" if speed is None else f"{speed:,.0f}", ""),
        ("seconds per step", brief(_median(start, "step_seconds")) if start else "", ""),
        ("waiting for data", "" if wait is None else percent(wait), "of the time"),
        ("time", duration(last["seconds"]) if last else "", "of the last start"),
        ("peak memory", "" if peak is None else f"{peak / 2**30:.2f} GiB", ""),
        ("TFLOP/s per device", brief(_median(start, "tflops")) if start else "", _mfu(start)),
    ]


def in_words(run: RunFiles) -> str:
    """Describe a run in a line: what was trained, on what size of images."""
    value = run.settings.get
    if run.kind not in (PRETRAINING, FINETUNING):
        return "A model without the log of its training"
    what = "Pretraining of a masked autoencoder" if run.kind == PRETRAINING else "Fine-tuning of a classifier"
    image_size = value("data.image_size")
    sides = [str(side) for side in image_size] if isinstance(image_size, list) and image_size else []
    width = value("model.width")
    size = value("model.size")
    depth = value("model.depth")
    blocks = counted(depth, "block") if type(depth) is int else f"{depth} blocks"
    shape = f", width {width}, {blocks}" if width else f", size {size}" if size else ""
    images = f" on images of {sides[0]}x{sides[-1]}" if sides else ""
    return f"{what}{shape}{images}"


def _median(records: Iterable[dict[str, Any]], name: str) -> float:
    return float(statistics.median(record[name] for record in records))


def _mfu(start: Sequence[dict[str, Any]]) -> str:
    known = [record["mfu"] for record in start if isinstance(record.get("mfu"), float)]
    return f"MFU {percent(statistics.median(known))}" if known else "MFU unknown"


def _held_out(run: RunFiles) -> list[dict[str, Any]]:
    records = run.online if run.kind == PRETRAINING else run.accuracies
    return [record for record in records if record["loss"] is not None]


def _levels(runs: Sequence[RunFiles]) -> list[Level]:
    """Return the baselines of the loss, if they are about the same for all runs."""
    found = [run.baselines for run in runs if run.baselines is not None]
    if len(found) < len(runs) or not found:
        return []
    first = found[0]
    if any(abs(each.patch_mean - first.patch_mean) > _SAME_BASELINE * first.patch_mean for each in found):
        return []
    normed = runs[0].settings.get("model.norm_pix_loss", True)
    name = "mean of each patch" if normed else "mean of all pixels"
    return [Level(name, first.patch_mean), Level("mean target of each place", first.place_mean)]


def _line(name: str, records: Iterable[dict[str, Any]], figure_name: str, color: int) -> Line:
    known = [record for record in records if isinstance(record.get(figure_name), int | float)]
    return Line(
        name, [float(record["epoch"]) for record in known], [float(record[figure_name]) for record in known], color
    )
