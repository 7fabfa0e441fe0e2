"""What is exported to other libraries is read back as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export.models import RECTANGLE, SQUARE, autoencoder, classifier, export
from safetensors.torch import load_file, save_file

from mae.errors import UserError
from mae.export.trained_model import TrainedModel
from mae.formats.opening import Normalization, open_model
from mae.formats.transformers_config import transformers_facts
from mae.models.weights import encoder_part

# Positions of another temperature: their tables are in the weights, so no library computes them again.
WARM = autoencoder(replace(SQUARE, position_temperature=10.0), (8, 8), 3)


def test_crops_of_transformers_are_the_same_to_the_pixel() -> None:
    for side, resized in ((224, 248), (224, 256), (384, 438), (96, 109), (16, 17), (49, 50)):
        processor = {"size": {"shortest_edge": resized}, "do_center_crop": True}
        crop = transformers_facts({"model_type": "vit", "image_size": side}, processor, Path("config.json")).crop_pct
        assert crop is not None
        assert int(side / crop) == resized


@pytest.mark.parametrize(
    ("model", "target", "file"),
    [
        (classifier(), "timm", ""),
        (classifier(pool="avg"), "timm", ""),
        (autoencoder(RECTANGLE, (8, 12), 1), "timm", ""),
        (classifier(), "safetensors", ""),
        (classifier(), "transformers", ""),
        (autoencoder(SQUARE, (8, 8), 3), "transformers", ""),
        (autoencoder(SQUARE, (8, 8), 3), "vit_mae", ""),
        (classifier("mlp", "cls+avg"), "transformers_code", ""),
        (classifier(), "torchvision", ""),
        (classifier(pool="avg"), "mae", "encoder.pth"),
        (classifier(), "mae", "encoder.pth"),
        *((WARM, target, file) for target, file in (("timm", ""), ("transformers", ""), ("vit_mae", ""))),
        (WARM, "safetensors", ""),
        (WARM, "mae", "encoder.pth"),
        (autoencoder(replace(SQUARE, mask_ratio=0.5, norm_pix_loss=True), (8, 8), 3), "mae", "full.pth"),
    ],
    ids=lambda value: None if isinstance(value, TrainedModel) else value,
)
def test_an_export_is_read_back(model: TrainedModel, target: str, file: str, tmp_path: Path) -> None:
    export(model, target, tmp_path / "out")
    described = model.description
    normalization = Normalization(described.mean, described.std) if target == "torchvision" else None
    back = open_model(tmp_path / "out" / file, normalization)
    is_whole = target == "vit_mae" or file == "full.pth" or (model.head is not None and target != "safetensors")
    expected = model.weights if is_whole else encoder_part(model.weights)
    assert back.weights.keys() == expected.keys()
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in expected.items())
    for name in ("width", "depth", "heads", "patch_size", "image_size", "channels", "mean", "std", "pool"):
        assert getattr(back.description, name) == getattr(described, name), name
    if target in ("timm", "safetensors", "mae"):  # these hold the description of the model
        assert back.description.position_temperature == described.position_temperature
    if target not in ("torchvision", "safetensors"):
        assert back.description.classes == described.classes
    if file == "full.pth":
        assert back.description.decoder == described.decoder


@pytest.mark.parametrize("value_range", [(0.0, 4096.0), (0.0, 4096.0, -1.0, 1.0)])
def test_the_range_of_values_outlives_the_header_that_timm_drops(
    value_range: tuple[float, ...], tmp_path: Path
) -> None:
    model = autoencoder(RECTANGLE, (8, 12), len(value_range) // 2)
    export(replace(model, description=replace(model.description, value_range=value_range)), "timm", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    save_file(load_file(weights), weights)
    assert open_model(tmp_path / "out").description.value_range == value_range
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"value_range": [4096, 0]}))
    with pytest.raises(UserError, match=r"config\.json: value_range is \(4096\.0, 0\.0\); allowed: LOW < HIGH"):
        open_model(tmp_path / "out")


def test_numbers_that_a_model_says_itself_are_not_replaced_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier()
    export(model, "timm", tmp_path / "out")
    capsys.readouterr()
    own = model.description
    open_model(tmp_path / "out", Normalization(own.mean, own.std), own.heads)
    assert capsys.readouterr().err == ""
    found = open_model(tmp_path / "out", Normalization((0.9,) * 3, (0.1,) * 3), heads=8).description
    assert (found.mean, found.std, found.heads) == (own.mean, own.std, own.heads)
    said = capsys.readouterr().err
    assert "says its own mean and std" in said
    assert "says that it has 2 heads; the 8 given are not used" in said
