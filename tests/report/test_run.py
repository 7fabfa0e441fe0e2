import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.patches import patchify
from mae.models.settings import MaskedAutoencoderSettings
from mae.report.run import trivial_loss, write_pretrain_report
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
    for step in range(1, 4):
        record = {**RECORD, "step": step, "epoch": float(step), **replaced}
        run.log({name: value for name, value in record.items() if value is not None})
    write_pretrain_report(run, settings, torch.device("cpu"))
    return re.sub(r"src=\"[^\"]+\"", "", run.report.read_text())


def test_the_report_tells_speed_memory_and_what_a_trivial_model_would_reach(tmp_path: Path) -> None:
    text = report(tmp_path / "known")
    for shown in ("1,234", "0.25", "12.5%", "99.5", "43.2%", "3.00", "1:15", "a loss of 0.9987"):
        assert shown in text
    assert "43.2%" not in report(tmp_path / "unknown", mfu=None)


@pytest.mark.parametrize(("patch_size", "channels"), [((4, 2), 3), ((1, 2), 1), ((8,), 5)])
def test_the_trivial_loss_is_what_means_alone_reach(patch_size: tuple[int, ...], channels: int) -> None:
    settings = MaskedAutoencoderSettings(
        width=16, depth=1, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, patch_size=patch_size
    )
    model = MaskedAutoencoder(settings, (16, 16), channels)
    target = model.target(patchify(1000 * torch.rand(50, channels, 16, 16), settings.patch))
    (told,) = re.findall(r"loss of ([\d.]+)", trivial_loss(settings, channels))
    assert target.square().mean().item() == pytest.approx(float(told), abs=2e-3)


def test_the_trivial_loss_of_plain_pixels_is_their_variance() -> None:
    assert "about 1, since pixels are normalised" in trivial_loss(MaskedAutoencoderSettings(norm_pix_loss=False), 3)
