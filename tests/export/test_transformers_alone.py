"""Folders for transformers load in a process that has neither this program nor timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export.models import SQUARE, autoencoder, classifier, export
from mae.export.targets import TARGETS
from mae.export.trained_model import TrainedModel

SCRIPT = """
import json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in ("mae", "timm") else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for absent in ("mae", "timm"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} is there")

import torch
for folder, example, output in json.load(sys.stdin):
    names = {"images": torch.load(folder + "/images.pt")}
    with torch.no_grad():
        exec(example, names)
    torch.save(names[output], folder + "/output.pt")
"""


@pytest.mark.slow
def test_the_examples_run_without_this_program_and_timm(tmp_path: Path) -> None:
    encoder, native, code = autoencoder(SQUARE, (8, 8), 3), classifier(), classifier("mlp", "cls+avg")
    cases: list[tuple[str, str, TrainedModel, str]] = [
        ("encoder", "transformers", encoder, "features"),
        ("classifier", "transformers", native, "logits"),
        ("code", "transformers_code", code, "logits"),
        ("mae", "vit_mae", encoder, "predicted_pixels"),
    ]
    jobs = []
    for name, target, model, output in cases:
        folder = tmp_path / name
        export(model, target, folder)
        torch.save(model.images(3), folder / "images.pt")
        jobs.append((str(folder), TARGETS[target].example(model, str(folder)), output))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    images = encoder.images(3)
    expected = {
        "encoder": encoder.features(images),
        "classifier": native.logits(images),
        "code": code.logits(images),
    }
    for name, ours in expected.items():
        theirs = torch.load(tmp_path / name / "output.pt")
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    # Its mask is random.
    assert torch.load(tmp_path / "mae" / "output.pt").shape == (3, 4, 48)
