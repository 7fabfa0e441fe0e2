import re
from pathlib import Path
from typing import Any

import torch

from mae.report.run import write_run_report
from mae.tasks.pretraining import PretrainSettings
from mae.training.run_folder.folder import RunFolder

RECORD = {
    "kind": "train",
    "loss": 0.5,
    "lr": 0.1,
    "images_per_second": 1234.0,
    "step_seconds": 0.25,
    "data_wait": 0.125,
    "tflops": 99.5,
    "mfu": 0.4321,
    "peak_memory": 3 * 2**30,
    "seconds": 75.0,
}


def report(folder: Path, **replaced: Any) -> str:
    run = RunFolder(folder)
    settings = PretrainSettings(run_dir=folder)
    run.create(settings)
    run.log({"kind": "baselines", "step": 0, "patch_mean": 0.73, "place_mean": 0.688, "images": 256})
    for step in range(1, 4):
        record = {**RECORD, "step": step, "epoch": float(step), **replaced}
        run.log({name: value for name, value in record.items() if value is not None})
    write_run_report(run, torch.device("cpu"))
    return re.sub(r"src=\"[^\"]+\"", "", run.report.read_text())


def test_the_report_tells_speed_memory_and_what_a_trivial_model_would_reach(tmp_path: Path) -> None:
    text = report(tmp_path / "known")
    for shown in (
        "1,234",
        "0.25",
        "12.5 %",
        "99.5",
        "43.2 %",
        "3.00",
        "1:15",
        "predicting each patch&#x27;s mean gives 0.730",
        "each place 0.688",
    ):
        assert shown in text
    assert "43.2 %" not in report(tmp_path / "unknown", mfu=None)
