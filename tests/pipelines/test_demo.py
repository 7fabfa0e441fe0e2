"""The demo, with one seed and few epochs: the ordinary pipelines on the shipped settings."""

from pathlib import Path

import pytest
import timm
import torch

from mae import demo
from mae.data.packing.digits import SPLITS
from mae.demo import Column, DemoSettings
from mae.errors import UserError


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped settings, but a few steps of each."""
    ordinary = demo._from_shipped
    monkeypatch.setattr(demo, "COLUMNS", (Column("5 labels per class", 5, 2),))
    quick = ["--optim.warmup_epochs", "0"]

    def from_shipped(stage: str, schema: type, flags: list[str]) -> object:
        return ordinary(stage, schema, [*flags, *quick, *(["--epochs", "1"] if stage == "pretrain" else [])])

    monkeypatch.setattr(demo, "_from_shipped", from_shipped)


def test_the_demo_runs_from_images_to_an_exported_encoder(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = demo.run(DemoSettings(tmp_path / "demo", seeds=2))
    text = report.read_text()
    assert "http" not in text
    assert text.count("<img") == 2
    assert f"On {SPLITS['test']} digits of the test split" in text
    shown = capsys.readouterr().out
    assert "pretrained" in shown
    assert "from scratch" in shown
    assert str(report) in shown
    encoder = timm.create_model(f"local-dir:{tmp_path}/demo/encoder", pretrained=True).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 1, 8, 8)).shape == (1, 64)


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("keep me")
    with pytest.raises(UserError, match="not an empty folder"):
        demo.run(DemoSettings(tmp_path))
