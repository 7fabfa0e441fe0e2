"""The demo, with two seeds and few epochs: the ordinary commands on the shipped settings."""

import json
import re
import statistics
from pathlib import Path

import pytest
import timm
import torch

from mae import demo
from mae.data.packing.digits import SPLITS
from mae.demo import Column, DemoSettings
from mae.errors import UserError
from mae.report.demo import ROWS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped settings, but a few steps of each."""
    ordinary = demo.command
    monkeypatch.setattr(demo, "COLUMNS", (Column("5 labels per class", 5, 2),))

    def command(name: str, words: list[str]) -> None:
        quick = {"pretrain": ["--epochs", "1", "--optim.warmup_epochs", "0"]}
        ordinary(name, [*words, *quick.get(name, [])])

    def finetuning(*given: object) -> demo._Run:
        run = ordinary_finetuning(*given)  # type: ignore[arg-type]
        return run._replace(words=[*run.words, "--optim.warmup_epochs", "0"])

    ordinary_finetuning = demo._finetuning
    monkeypatch.setattr(demo, "command", command)
    monkeypatch.setattr(demo, "_finetuning", finetuning)


def test_the_demo_runs_from_images_to_an_exported_encoder(
    rendered: None, short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = demo.run(DemoSettings(tmp_path / "demo", seeds=2))
    text = report.read_text()
    assert "://" not in text
    assert text.count("<img") == text.count('src="data:image/') > 100
    for heading in (
        "What the model sees",
        "Reconstructions through time",
        "Classes, fine-tuned with 5 labels per class",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert f"On {SPLITS['test']} digits of the test split" in text
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^│ (.+?) +│ +([\d.]+)% ±", shown, re.MULTILINE))
    assert list(rows) == list(ROWS)
    assert all(text.count(f">{row}<") > 1 and what in text for row, what in ROWS.items())
    # A step of pretraining teaches nothing yet: both encoders are random, and far below the pixels.
    assert 30 < float(rows["linear probe: pretrained"]) < 75
    assert 30 < float(rows["linear probe: untrained"]) < 75
    assert 75 < float(rows["linear probe: pixels"]) < 92
    assert 80 < float(rows["SVM: pixels"]) < 92
    assert str(report) in shown
    cells = json.loads((report.parent / "results.json").read_text())["cells"]
    assert f"{statistics.mean(cells[-1]['accuracies']):.1%}"[:-1] in text
    assert {cell["encoder"] for cell in cells} == set(ROWS)
    assert {len(cell["accuracies"]) for cell in cells} == {2}
    assert "$ mae pretrain --config " in shown
    encoder = timm.create_model(f"local-dir:{tmp_path}/demo/encoder", pretrained=True).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 1, 8, 8)).shape == (1, 64)


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("keep me")
    with pytest.raises(UserError, match="not an empty folder"):
        demo.run(DemoSettings(tmp_path))
