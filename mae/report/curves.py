"""Plots of a run, made from the records of its `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mae.report.pictures import figure_png
from mae.tasks.baselines import Baselines


def draw_training(
    records: Sequence[Mapping[str, Any]],
    baselines: Baselines | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """Plot loss, learning rate and speed over epochs, and return a PNG file.

    Baselines are lines beside the loss, and so is the held-out loss of `evaluations`.
    """
    train = [r for r in records if r["kind"] == "train"]
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    plots = figure.subplots(1, 3)
    for axes, (name, label) in zip(
        plots,
        (("loss", "training loss"), ("lr", "learning rate"), ("images_per_second", "images per second")),
        strict=True,
    ):
        axes.plot([r["epoch"] for r in train], [r[name] for r in train], color="#1f6feb", linewidth=1.3)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    if baselines is not None:
        plots[0].axhline(baselines.patch_mean, color="#57606a", linestyle="--", label="mean of each patch")
        plots[0].axhline(baselines.place_mean, color="#57606a", linestyle=":", label="mean of each place")
    if evaluations:
        epochs, losses = [r["epoch"] for r in evaluations], [r["loss"] for r in evaluations]
        plots[0].plot(epochs, losses, color="#bc4c00", linewidth=1.0, marker=".", label="held-out loss")
        plots[0].set_title("training and held-out loss", fontsize=10)
    if baselines is not None or evaluations:
        plots[0].legend(fontsize=7)
    return figure_png(figure)


def draw_accuracy(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot evaluation accuracy over epochs, and return a PNG file."""
    evaluations = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    epochs, accuracies = [r["epoch"] for r in evaluations], [100 * r["accuracy"] for r in evaluations]
    axes.plot(epochs, accuracies, color="#1a7f37", marker=".")
    axes.set_title("evaluation accuracy [%]", fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure_png(figure)


def draw_evaluations(records: Sequence[Mapping[str, Any]], last_epoch: float) -> bytes:
    """Plot accuracies and rank of the evaluations while pretraining over the epochs of the loss; return a PNG file.

    Figures that a record lacks are left out.
    """
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    plots = figure.subplots(1, 2)
    for axes, title, names, scale in (
        (plots[0], "accuracy of frozen features [%]", {"knn": "k-NN", "few_shot": "few-shot"}, 100),
        (plots[1], "rank of the features (RankMe)", {"rank": "rank"}, 1),
    ):
        for (name, label), color in zip(names.items(), ("#1a7f37", "#8250df"), strict=False):
            known = [r for r in records if r.get(name) is not None]
            if known:
                values = [scale * r[name] for r in known]
                axes.plot([r["epoch"] for r in known], values, color=color, marker=".", label=label)
                axes.legend(fontsize=7)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_xlim(0, 1.05 * last_epoch)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return figure_png(figure)
