"""Exports by torch.export."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from export.models import SQUARE, autoencoder, classifier, export
from mae.errors import UserError
from mae.export.targets import TARGETS
from mae.export.torch_export import INSTRUCTIONS_FILE, TorchExport
from mae.export.trained_model import TrainedModel
from mae.export.whole_model import expected_outputs, instructions, whole_model

CLASSIFIER = classifier("mlp", "cls+avg")
MACHINE = [str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, ".py", "stack_trace"]
"""What a file must not say about the machine that wrote it."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch_export") / "out"
    assert export(CLASSIFIER, "torch_export", folder).greatest_difference < 1e-6
    return folder


def require_equal_outputs(model: TrainedModel, folder: Path) -> None:
    """Of a batch of another size than those that the export compared."""
    images = torch.randn(7, *model.images(1).shape[1:])
    found, expected = torch.export.load(folder / "model.pt2").module()(images), expected_outputs(model, images)
    assert list(found) == list(expected)
    for name, ours in expected.items():
        torch.testing.assert_close(found[name], ours, rtol=0, atol=1e-6)
        assert not found[name].requires_grad


def test_a_disk_that_takes_no_more_is_an_error_of_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*model.pt2'"):
            export(CLASSIFIER, "torch_export", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_every_output_of_a_classifier_is_the_models(exported: Path) -> None:
    require_equal_outputs(CLASSIFIER, exported)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(autoencoder(SQUARE, (8, 8), 1), id="one-channel"),
        pytest.param(autoencoder(SQUARE, (32, 96), 5), id="rectangle-of-five"),
        pytest.param(classifier("linear", "avg"), id="linear-avg"),
        pytest.param(classifier("linear", "cls"), id="linear-cls", marks=pytest.mark.slow),
        pytest.param(classifier("linear", "cls+avg"), id="linear-cls+avg", marks=pytest.mark.slow),
        pytest.param(classifier("mlp", "cls"), id="mlp-cls", marks=pytest.mark.slow),
        pytest.param(classifier("mlp", "avg"), id="mlp-avg", marks=pytest.mark.slow),
    ],
)
def test_every_size_head_and_pool_is_held_whole(tmp_path: Path, model: TrainedModel) -> None:
    result = export(model, "torch_export", tmp_path / "out")
    require_equal_outputs(model, tmp_path / "out")
    assert set(result.left_behind) == set(model.decoder_names)


def test_the_file_says_how_images_are_prepared(exported: Path) -> None:
    found = {INSTRUCTIONS_FILE: ""}
    torch.export.load(exported / "model.pt2", extra_files=found)
    assert json.loads(found[INSTRUCTIONS_FILE]) == instructions(CLASSIFIER)


def test_the_file_says_nothing_about_the_machine(exported: Path) -> None:
    with zipfile.ZipFile(exported / "model.pt2") as file:
        content = b"\n".join(map(file.read, file.namelist()))
    assert [text for text in MACHINE if text.encode() in content] == []


FRESH = """
import sys
for name in ("mae", "timm", "torchvision"):
    sys.modules[name] = None
import torch
images = torch.load(sys.argv[1])
{example}
torch.save(outputs, sys.argv[2])
"""


@pytest.mark.slow
def test_the_example_runs_where_only_torch_is(exported: Path, tmp_path: Path) -> None:
    images = CLASSIFIER.images(3)
    torch.save(images, tmp_path / "images.pt")
    script = FRESH.format(example=TARGETS["torch_export"].example(CLASSIFIER, str(exported)))
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "images.pt"), str(tmp_path / "found.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found["logits"], CLASSIFIER.logits(images), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from export.models import classifier, export\n"
        "export(classifier('mlp', 'cls+avg'), 'torch_export', Path('out'))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "out" / "model.pt2").read_bytes() == (exported / "model.pt2").read_bytes()


def test_an_export_of_other_weights_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = classifier("mlp", "cls+avg")
    other.vit.norm.bias.data[0] += 1e-3
    monkeypatch.setattr("mae.export.torch_export.whole_model", lambda _: whole_model(other))
    with pytest.raises(UserError, match=r"cls of 1 images of the export to torch_export differ by .*; nothing was"):
        export(CLASSIFIER, "torch_export", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_half_a_file_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = (exported / "model.pt2").read_bytes()[:20_000]
    monkeypatch.setattr(TorchExport, "write", lambda _, __, folder: (folder / "model.pt2").write_bytes(half))
    with pytest.raises((RuntimeError, zipfile.BadZipFile)):
        export(CLASSIFIER, "torch_export", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
