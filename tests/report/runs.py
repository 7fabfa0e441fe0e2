"""Folders of runs with a log that a test makes up, and no training."""

import json
from pathlib import Path
from typing import Any

from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.run_folder.folder import RunFolder

TRAIN = {
    "kind": "train",
    "lr": 1e-4,
    "loss": 0.5,
    "grad_norm": 1.0,
    "skipped": 0,
    "images_per_second": 1234.0,
    "step_seconds": 0.25,
    "data_wait": 0.02,
    "tflops": 99.5,
    "peak_memory": 3 * 2**30,
}
BASELINES = {"kind": "baselines", "step": 0, "patch_mean": 0.73, "place_mean": 0.688, "images": 256}


def make_run(path: Path, losses: list[float | None], reason: str = "finished", **changed: Any) -> RunFolder:
    """A pretraining of 50 epochs whose log has these losses, one line an epoch of 10 steps."""
    from mae.data.settings import DataSettings

    settings = PretrainSettings(run_dir=path, epochs=50.0, data=DataSettings(shards=("gone/train-*.tar",)))
    folder = RunFolder(path)
    folder.create(settings)
    folder.log(BASELINES)
    for number, loss in enumerate(losses, 1):
        seconds = 2.5 * number
        folder.log(TRAIN | {"step": 10 * number, "epoch": float(number), "loss": loss, "seconds": seconds} | changed)
    if reason:
        folder.record_exit(reason, f"{10 * len(losses)} steps")
    return folder


def make_finetuning(path: Path, accuracies: list[float], **changed: Any) -> RunFolder:
    """A fine-tuning whose log has these accuracies, one an epoch of 10 steps."""
    folder = RunFolder(path)
    folder.create(FinetuneSettings(run_dir=path, epochs=float(len(accuracies))))
    for number, accuracy in enumerate(accuracies, 1):
        place = {"step": 10 * number, "epoch": float(number)}
        folder.log(TRAIN | place | {"loss": 2 / number, "seconds": 2.5 * number} | changed)
        folder.log({"kind": "eval", **place, "accuracy": accuracy, "loss": 1 - accuracy, "samples": 100})
    folder.record_exit("finished", f"{10 * len(accuracies)} steps")
    return folder


def log(folder: RunFolder, **record: Any) -> None:
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
