"""Export at the end of a run: refused at the start, made after the model is published, never at its cost."""

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm

from mae.errors import PreemptedError, UserError
from mae.export.target import Difference
from mae.export.timm import Timm
from mae.pipelines import finetune, pretrain
from mae.settings import parse

FLAGS = [
    "--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "4", "--epochs", "1",
    "--data.workers", "0", "--data.image_size", "8", "--data.channels", "1", "--data.crop_pct", "1", "--batch_size",
    "4", "--optim.warmup_epochs", "0",
]  # fmt: skip
DECODER = ["--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([8])


def pretrain_flags(shards: Path, run: Path, *targets: str) -> list[str]:
    places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(run), "--picture_images", "1"]
    return [*FLAGS, *DECODER, *places, *(["--export.targets", *targets] if targets else [])]


def pretrained(shards: Path, run: Path, *targets: str) -> None:
    pretrain.run(parse(pretrain.PretrainSettings, pretrain_flags(shards, run, *targets), "mae pretrain"))


def ending(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return found


def test_a_finished_run_is_exported_once(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    pretrained(shards, run, "timm", "safetensors")
    assert sorted(path.name for path in run.glob("export-*")) == ["export-safetensors", "export-timm"]
    card = (run / "export-timm" / "README.md").read_text()
    assert "| steps | 2 |" in card
    assert "| training samples | 8 |" in card
    assert "reconstructions.png" in card
    assert ending(run)["reason"] == "finished"
    before = {path: path.stat().st_mtime_ns for path in run.glob("export-*/*")}
    pretrained(shards, run, "timm", "safetensors")
    assert {path: path.stat().st_mtime_ns for path in run.glob("export-*/*")} == before
    assert f"{run / 'export-timm'} holds model.safetensors already" in capsys.readouterr().out
    assert ending(run)["reason"] == "finished"


def test_a_run_from_before_the_setting_is_resumed_and_exported(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrained(shards, run)
    saved = (run / "settings.yaml").read_text()
    assert "export:\n  targets: []\n" in saved
    (run / "settings.yaml").write_text(saved.replace("export:\n  targets: []\n", ""))
    pretrained(shards, run, "safetensors")
    assert (run / "export-safetensors" / "model.safetensors").is_file()


def test_the_best_model_of_a_fine_tuning_is_exported_with_its_head(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    places = ["--data.shards", str(shards / "*.tar"), "--eval_shards", str(shards / "*.tar"), "--eval_overlap", "1"]
    flags = [*FLAGS, *places, "--run_dir", str(run), "--head", "linear", "--augment.rand_augment", "none"]
    finetune.run(parse(finetune.FinetuneSettings, [*flags, "--export.targets", "timm"], "mae finetune"))
    assert timm.create_model(f"local-dir:{run / 'export-timm'}", pretrained=True).num_classes == 4
    assert json.loads((run / "export-timm" / "verification.json").read_text())["model"]["file"] == "best.safetensors"
    assert "selected on this set" in (run / "export-timm" / "README.md").read_text()


def refuse(self: Timm, model: Any) -> str:
    # Shapes are known at the start.
    assert tuple(model.encoder_weights["cls_token"].shape) == (1, 1, 16)
    return "it has no pixels; give it some"


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("refusal", refuse, r"timm cannot hold .*: it has no pixels; give it some"),
        ("requires", ("nowhere>=1",), r"export to timm needs nowhere>=1; nowhere is missing: pip install"),
    ],
)
def test_a_target_that_is_not_possible_is_refused_at_the_start(
    attribute: str, value: Any, message: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Timm, attribute, value)
    with pytest.raises(UserError, match=message):
        pretrained(shards, tmp_path / "run", "safetensors", "timm")
    assert not (tmp_path / "run").exists()


def test_an_unknown_target_is_refused_at_the_start(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export\.targets is tim; allowed: timm, "):
        pretrained(shards, tmp_path / "run", "tim")
    assert not (tmp_path / "run").exists()


def test_an_export_that_fails_costs_neither_the_model_nor_the_other_exports(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def fails(self: Timm, model: Any, folder: Path) -> Iterable[Difference]:
        raise RuntimeError("no room\nfor this")

    with monkeypatch.context() as patch:
        patch.setattr(Timm, "compare", fails)
        with pytest.raises(SystemExit) as end:
            pretrain.main(pretrain_flags(shards, run, "timm", "safetensors"))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("error: the run is finished and its model is")
    assert error.endswith(f"RuntimeError: no room and 1 more; to try again: mae export {run} --to timm")
    assert (run / "model.safetensors").is_file()
    assert (run / "report.html").is_file()
    assert [path.name for path in run.glob("*export-*")] == ["export-safetensors"]
    assert ending(run)["reason"] == "error"
    pretrained(shards, run, "timm", "safetensors")
    assert (run / "export-timm" / "verification.json").is_file()
    assert ending(run)["reason"] == "finished"


def test_a_signal_in_an_export_is_a_preemption(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(self: Timm, model: Any, folder: Path) -> Iterable[Difference]:
        assert ending(tmp_path / "run")["reason"] == "error", "it is not finished yet"
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(Timm, "compare", stops)
    with pytest.raises(PreemptedError, match="SIGTERM: stopped while the model was exported; the same command exports"):
        pretrained(shards, tmp_path / "run", "timm")
    assert ending(tmp_path / "run")["reason"] == "preempted"
    assert list((tmp_path / "run").glob("*export-*")) == []
