"""Folders that are no run, or only a part of one: a page with sentences, or one line and exit code 2."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mae import cli
from mae.report.reading import read_run, training_lines
from mae.report.run import report
from mae.training.run_folder.folder import RunFolder
from tests.report.runs import TRAIN, log, make_finetuning, make_run

CPU = torch.device("cpu")


def text_of(path: Path) -> str:
    return report([read_run(path)], CPU)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name, reason in (("", "holds no run"), ("file", "is a file"), ("gone", "does not exist")):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", str(tmp_path / name), "--out", str(tmp_path / "out.html")])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
        assert "give the folder of a run" in line
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out.pdf")])
    assert "ends in .html" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_settings_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [], "")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    text = text_of(tmp_path / "run")
    assert "The log of the training is lost, or training has not begun" in text
    assert "neither a model nor a checkpoint is in the folder of the run" in text
    assert "not begun" in text
    assert "No such file" not in text


def test_a_model_alone(pretrained: RunFolder, tmp_path: Path) -> None:
    """An encoder that was copied out of its run: what its header tells, and no sections that would be empty."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(pretrained.model, alone)
    text = text_of(alone)
    assert re.findall(r"<h2>([^<]+)", text) == ["What this page sees", "Model", "Environment"]
    assert "This folder holds a model, but neither settings nor a log of its training: there are no curves." in text
    assert ">model only</span>" in text
    assert "<td>images</td><td>8x8 pixels, 1 channel, patches of 2x2</td>" in text
    (alone / "model.safetensors").write_bytes(b"cut off")
    assert "does not exist" not in text
    text = text_of(alone)
    assert "The model cannot be described: model file" in text
    assert "is damaged" in text


def test_a_run_without_checkpoints_and_model(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "finished", [0.6, 0.5]).path)
    assert "The run is finished, but its model is not in the folder: it was moved or removed." in text
    killed = replace(read_run(make_run(tmp_path / "killed", [0.6, 0.5], "").path), is_running=False)
    assert "The same command begins anew, as no checkpoint is there." in report([killed], CPU, 0)
    kept = replace(killed, checkpoints=[10])
    assert "The same command goes on from its newest checkpoint." in report([kept], CPU, 0)


def test_a_log_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [0.6, 0.5])
    (tmp_path / "run" / "settings.yaml").unlink()
    text = text_of(tmp_path / "run")
    assert "The settings are lost, or cannot be read." in text
    assert "settings.yaml does not exist" in text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5])
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n" + json.dumps({"kind": "train", "step": 30, "loss": "<i>"}).encode() + b"\n{cut")
    (folder.path / "settings.yaml").write_text("a: [\n")
    (folder.path / "exit.json").write_text("[]")
    (folder.path / "rollback.json").write_text("{}")
    (folder.path / "bad-samples.txt").mkdir()
    (folder.path / "history.jsonl").write_bytes(b'\xff\n{"kind": "start"}\n{"kind": "start", "step": "<b>"}\n')
    (folder.pictures / "step-000000001.png").write_bytes(b"no picture")
    (folder.pictures / "step-<b>.png").mkdir()
    text = text_of(folder.path)
    for sentence in (
        "2 lines of metrics.jsonl are no records",
        "is not valid YAML",
        "exit.json is no record of an end",
        "rollback.json cannot be used",
        "bad-samples.txt",
        "No picture of a reconstruction is saved, or none can be read.",
    ):
        assert sentence in text
    assert "Traceback" not in text
    assert "<i></i>" not in text
    assert "<b>" not in text.replace("<b role", "")


def test_a_huge_picture_and_one_of_another_kind(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5])
    Image.new("1", (20_000, 9_000)).save(folder.pictures / "step-000000001.png")
    Image.new("RGB", (30, 30)).save(folder.pictures / "step-000000002.png", format="JPEG")
    Image.new("RGBA", (30, 60), (255, 0, 0, 0)).save(folder.pictures / "step-000000003.png")
    text = text_of(folder.path)
    assert text.count("<img") == 1
    assert "step 3" in text


def test_names_of_any_bytes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"<script>alert(1)<_script>\xff")
    folder = make_run(tmp_path / odd, [0.6, 0.5])
    folder.record_bad_samples(["</td><script>\udcff"])
    text = text_of(folder.path)
    assert text.count("<script>") == 1  # its own
    assert "\\xff" in text
    assert "&lt;script&gt;alert(1)" in text
    text.encode()


@pytest.mark.parametrize(
    "changed",
    [
        {"data.value_range": ["a", None], "data.channels": "x", "data.image_size": [], "data.cache_dir": 3},
        {"data.shards": 3, "evaluation.eval_shards": {"a": 1}, "epochs": float("inf"), "data.index": [1]},
        {"data.shards": ["{a"], "optim.warmup_epochs": "long", "data.workers": None, "model.width": [1]},
        {"data.shards": ["a\x00b"], "data.image_extension": "../x", "epochs": 10**400, "data.max_bad_samples": True},
    ],
)
def test_settings_of_any_kind(pretrained: RunFolder, changed: dict[str, Any]) -> None:
    run = read_run(pretrained.path)
    assert "What this page sees" in report([replace(run, settings=run.settings | changed)], CPU)


def test_figures_of_any_size(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [0.6, 0.5, 0.4]).path)
    last = TRAIN | {"step": 40, "epoch": 4.0, "seconds": 10.0}
    for name in ("epoch", "lr", "images_per_second", "seconds", "peak_memory", "loss", "data_wait"):
        for extreme in (1e299, -1e299, 1e-299, 0, -3.5, 10**30):
            text = report([replace(run, train=[*run.train, *training_lines([last | {name: extreme}])])], CPU, 0)
            assert "<svg" in text
            assert not re.search(r'(d="[^"]*|%">)(nan|inf)', text), (name, extreme)


@pytest.mark.parametrize("ending", ["[]", "", "{", "[" * 60_000])
def test_an_end_that_is_none(tmp_path: Path, ending: str) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5])
    (folder.path / "exit.json").write_text(ending)
    assert "exit.json is no record of an end" in text_of(folder.path)


def test_a_step_that_is_too_large_is_no_record(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5], "")
    log(folder, **TRAIN | {"step": 10**400, "epoch": 3.0, "seconds": 10.0})
    text = text_of(folder.path)
    assert "1 lines of metrics.jsonl are no records" in text
    assert "after step 20 of 500" in text


@pytest.mark.parametrize("name", ["epoch", "lr", "images_per_second", "data_wait"])
def test_figures_that_are_all_below_zero(tmp_path: Path, name: str) -> None:
    assert text_of(make_run(tmp_path / "run", [0.6, 0.5], **{name: -1.0}).path).count("<svg") == 4


@pytest.mark.parametrize("samples", [0, -4])
def test_an_evaluation_of_no_samples(tmp_path: Path, samples: int) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5, 0.4])
    for number, accuracy in enumerate((0.5, 0.4, 0.1), 1):
        shown = {"step": 10 * number, "epoch": number, "loss": 0.5, "knn": accuracy, "share_of_time": 0.1}
        log(folder, kind="evaluation", samples=samples, **shown)
    assert "Evaluation while pretraining" in text_of(folder.path)


@pytest.mark.parametrize("figure", [float("inf"), float("nan"), 10**400, "x"])
@pytest.mark.parametrize("kind", ["evaluation", "eval"])
def test_figures_that_no_evaluation_has(tmp_path: Path, kind: str, figure: object) -> None:
    folder = make_run(tmp_path / "run", [0.6]) if kind == "evaluation" else make_finetuning(tmp_path / "run", [0.6])
    shown = {"step": 20, "epoch": 2.0, "loss": 0.5, "samples": 9, "accuracy": 0.5, "share_of_time": 0.1}
    log(folder, kind=kind, **shown, knn=figure, few_shot=figure, rank=figure)
    assert "<svg" in text_of(folder.path)


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    """Settings that are gone or that were written otherwise, and no history."""
    folder = make_run(tmp_path / "run", [0.6, 0.5, 0.4])
    settings = (folder.path / "settings.yaml").read_text()
    (folder.path / "settings.yaml").write_text(settings.replace("epochs: 50.0", "epochs: many\nold_setting: 3"))
    text = text_of(folder.path)
    assert "old_setting" in text
    assert "finished: 30 steps" in text
