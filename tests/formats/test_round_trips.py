"""What is exported to other libraries is read back as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export.models import RECTANGLE, SQUARE, autoencoder, classifier, export

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
    ],
    ids=lambda value: None if isinstance(value, TrainedModel) else value,
)
def test_an_export_is_read_back(model: TrainedModel, target: str, file: str, tmp_path: Path) -> None:
    export(model, target, tmp_path / "out")
    described = model.description
    back = open_model(tmp_path / "out" / file, Normalization(described.mean, described.std), heads=described.heads)
    is_whole = target == "vit_mae" or (model.head is not None and target != "safetensors")
    expected = model.weights if is_whole else encoder_part(model.weights)
    assert back.weights.keys() == expected.keys()
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in expected.items())
    for name in ("width", "depth", "heads", "patch_size", "image_size", "channels", "mean", "std", "pool"):
        assert getattr(back.description, name) == getattr(described, name), name
    if target in ("timm", "safetensors"):  # these hold the description of the model
        assert back.description.position_temperature == described.position_temperature
    if file == "" and target not in ("torchvision", "safetensors"):
        assert back.description.classes == described.classes
