"""Exports to ONNX. An export takes a second or two: tests share them, and those of every pool and head are slow."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf
from torch import Tensor

from export.models import SQUARE, autoencoder, classifier, export
from mae import __version__
from mae.data.loader import normalize
from mae.data.statistics import PixelStatistics
from mae.errors import UserError
from mae.export.exporting import export_model
from mae.export.onnx import needs_second_file
from mae.export.targets import TARGETS
from mae.export.trained_model import TrainedModel
from mae.models.classifier import HeadKind
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.models.vit import TokenKind

CLASSIFIER = classifier("mlp", "cls+avg")
MACHINE = [str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, ".py", "stack_trace"]
"""What a file must not say about the machine that wrote it."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    export(CLASSIFIER, "onnx", folder)
    return folder


@pytest.fixture(scope="module")
def from_pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx_uint8") / "out"
    export(CLASSIFIER, "onnx_uint8", folder)
    return folder


def outputs(folder: Path, images: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {"images": images.numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


def require_equal_outputs(model: TrainedModel, folder: Path) -> None:
    """Of a batch of another size than those that the export compared."""
    images = torch.randn(7, *model.images(1).shape[1:])
    found, tokens = outputs(folder, images), model.tokens(images)
    expected = {"cls": tokens[:, 0], "patches": tokens[:, 1:]}
    if model.description.pool != "cls":
        expected["features"] = model.features(images)
    if model.head:
        expected["logits"] = model.logits(images)
    assert list(found) == list(expected)
    for name, ours in expected.items():
        torch.testing.assert_close(found[name], ours, rtol=0, atol=1e-5)
        assert ours.abs().max() > 0.01, name


def pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8)


def test_every_output_of_a_classifier_is_the_models(exported: Path) -> None:
    require_equal_outputs(CLASSIFIER, exported)


def test_a_rectangle_of_five_channels_has_its_tokens(tmp_path: Path) -> None:
    model = autoencoder(SQUARE, (32, 96), 5)
    result = export(model, "onnx", tmp_path / "out")
    require_equal_outputs(model, tmp_path / "out")
    assert set(result.left_behind) == set(model.decoder_names)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_every_head_and_pool_is_held_whole(tmp_path: Path, head: HeadKind, pool: TokenKind) -> None:
    model = classifier(head, pool)
    result = export(model, "onnx", tmp_path / "out")
    require_equal_outputs(model, tmp_path / "out")
    assert result.left_behind == []


def test_the_file_says_how_images_are_prepared_and_what_the_classes_are(exported: Path, from_pixels: Path) -> None:
    found = [
        {each.key: json.loads(each.value) for each in onnx.load(folder / "model.onnx").metadata_props}
        for folder in (exported, from_pixels)
    ]
    assert found[0] == {
        "input": "float32 [batch, channels, height, width]: (pixels / 255 - mean) / std",
        "image_size": [8, 8],
        "channels": 3,
        "crop_pct": 0.9,
        "resize": "bicubic with antialias, to just cover floor(image_size / crop_pct); then the centre of image_size",
        "mean": [0.4, 0.4, 0.4],
        "std": [0.2, 0.2, 0.2],
        "value_range": None,
        "outputs": ["cls", "patches", "features", "logits"],
        "pool": "cls+avg",
        "labels": ["cat", "dog", "red panda"],
        "mae_version": __version__,
    }
    assert found[1] == found[0] | {"input": "uint8 [batch, height, width, channels], from 0 to 255"}


def test_the_file_says_nothing_about_the_machine(exported: Path, from_pixels: Path) -> None:
    for folder in (exported, from_pixels):
        content = (folder / "model.onnx").read_bytes()
        assert [text for text in MACHINE if text.encode() in content] == []


def test_pixels_are_normalised_inside_as_in_training(exported: Path, from_pixels: Path) -> None:
    statistics = PixelStatistics(CLASSIFIER.description.mean, CLASSIFIER.description.std)
    images = pixels(3)
    normalised = outputs(exported, normalize(images.permute(0, 3, 1, 2), statistics))
    for name, found in outputs(from_pixels, images).items():
        torch.testing.assert_close(found, normalised[name], rtol=0, atol=1e-5)


def test_a_model_of_more_than_8_bits_has_no_pixels_of_8_bits(tmp_path: Path) -> None:
    wide = replace(CLASSIFIER, description=replace(CLASSIFIER.description, value_range=(0.0, 4096.0)))
    with pytest.raises(UserError, match=r"onnx_uint8 cannot hold .*: .* more than 8 bits; --to onnx takes them"):
        export(wide, "onnx_uint8", tmp_path / "out")
    assert TARGETS["onnx"].refusal(wide) is None


def test_one_channel_and_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae.export.onnx._MOST_BYTES_IN_ONE_FILE", 1000)
    model = autoencoder(SQUARE, (8, 8), 1)
    export(model, "onnx", tmp_path / "out")
    # Found beside the first file, wherever the folder is.
    folder = (tmp_path / "out").rename(tmp_path / "moved")
    assert {path.name for path in folder.glob("model*")} == {"model.onnx", "model.onnx.data"}
    assert (folder / "model.onnx.data").stat().st_size > 10_000
    require_equal_outputs(model, folder)


@pytest.mark.parametrize(("size", "patch", "is_needed"), [("large", 16, False), ("huge", 14, True)])
def test_a_model_of_more_than_2_gigabytes_needs_a_second_file(size: Any, patch: int, is_needed: bool) -> None:
    with torch.device("meta"):
        vit = build_encoder(EncoderSettings(size=size, patch_size=(patch,)), (224, 224), 3)
    assert needs_second_file(vit) == is_needed


FRESH = """
import sys
for name in ("mae", "torch", "timm", "torchvision", "onnx", "onnxscript"):
    sys.modules[name] = None
import numpy
images = numpy.load(sys.argv[1])
{example}
numpy.savez(sys.argv[2], logits=logits)
"""


@pytest.mark.parametrize("name", ["onnx", "onnx_uint8"])
def test_the_example_runs_where_only_onnxruntime_and_numpy_are(
    exported: Path, from_pixels: Path, tmp_path: Path, name: str
) -> None:
    folder = {"onnx": exported, "onnx_uint8": from_pixels}[name]
    images = CLASSIFIER.images(3)
    if name == "onnx_uint8":
        # The example's black image.
        images = torch.full((1, 3, 8, 8), (0 - 0.4) / 0.2)
    np.save(tmp_path / "images.npy", images.numpy())
    script = FRESH.format(example=TARGETS[name].example(CLASSIFIER, str(folder)))
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "images.npy"), str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = torch.from_numpy(np.load(tmp_path / "found.npz")["logits"])
    torch.testing.assert_close(found, CLASSIFIER.logits(images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from export.models import classifier, export\n"
        "export(classifier('mlp', 'cls+avg'), 'onnx', Path('out'))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()


def test_a_file_with_another_weight_is_refused_and_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = onnx.load(exported / "model.onnx")
    (bias,) = [each for each in file.graph.initializer if each.name.endswith("norm.bias") and "blocks" not in each.name]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    monkeypatch.setattr("mae.export.onnx._write", lambda *given: given[-1].write_bytes(file.SerializeToString()))
    with pytest.raises(UserError, match=r"the cls of 1 images of the export to onnx differ by .*; nothing"):
        export(CLASSIFIER, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_half_a_file_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = (exported / "model.onnx").read_bytes()[:20_000]
    monkeypatch.setattr("mae.export.onnx._write", lambda *given: given[-1].write_bytes(half))
    with pytest.raises(InvalidProtobuf):
        export(CLASSIFIER, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_old_packages_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnx":
            raise PackageNotFoundError
        return "0.5.7" if name == "onnxscript" else "1.32.0"

    monkeypatch.setattr("mae.versions.version", version)
    message = (
        "export to onnx needs onnx>=1.18, onnxscript>=0.6; onnx is missing, onnxscript 0.5.7: "
        "pip install 'mae-pretraining[onnx]'"
    )
    with pytest.raises(UserError) as error:
        export(CLASSIFIER, "onnx", tmp_path / "out")
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []
    said: list[str] = []
    monkeypatch.setattr("mae.export.exporting.TARGETS", {name: TARGETS[name] for name in ("onnx", "safetensors")})
    export_model(CLASSIFIER, ["all"], tmp_path / "out", said.append)
    assert f"left out: {message}" in said
