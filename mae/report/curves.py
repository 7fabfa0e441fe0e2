"""Plots of a run, made from the records of its `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mae.report.pictures import figure_png
from mae.tasks.baselines import Baselines


def draw_training(records: Sequence[Mapping[str, Any]], baselines: Baselines | None = None) -> bytes:
    """Plot loss, learning rate and speed over epochs, and return a PNG file; baselines are lines beside the loss."""
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
