"""Folders of transformers hold our models: same tokens, logits and preprocessing."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mae
from export.models import MODELS, RECTANGLE, SQUARE, autoencoder, classifier, export, trained
from mae.errors import UserError
from mae.export.trained_model import TrainedModel
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.vit import TokenKind
from mae.models.weights import file_tensors

pytestmark = pytest.mark.usefixtures("offline")

NAMES_OF_BLOCK = [
    "layernorm_before",
    "layernorm_after",
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


def encoder_names(prefix: str) -> set[str]:
    """Names on disk that version 4 and version 5 read, of an encoder of two blocks."""
    layers = [f"encoder.layer.{block}.{name}" for block in (0, 1) for name in NAMES_OF_BLOCK]
    layers += ["embeddings.patch_embeddings.projection", "layernorm"]
    pairs = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return {f"{prefix}{name}" for name in [*pairs, "embeddings.cls_token", "embeddings.position_embeddings"]}


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def loaded(auto_class: Any, folder: Path) -> Any:
    theirs, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return theirs.eval()


@pytest.mark.parametrize(("settings", "image_size", "channels"), [*MODELS, (SQUARE, (8, 8), 1), (SQUARE, (32, 96), 3)])
def test_transformers_computes_the_same_tokens(
    tmp_path: Path, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int
) -> None:
    from transformers import AutoModel

    model = autoencoder(settings, image_size, channels)
    exported = export(model, "transformers", tmp_path / "out")
    theirs = loaded(AutoModel, tmp_path / "out")
    images = torch.randn(3, channels, *image_size)
    with torch.no_grad():
        output = theirs(images)
    torch.testing.assert_close(output.last_hidden_state, model.tokens(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, model.features(images), rtol=0, atol=1e-5)
    assert type(theirs).__name__ == "ViTModel"
    assert list(exported.left_behind) == model.decoder_names


def test_transformers_computes_the_same_logits_and_knows_the_classes(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = classifier()
    exported = export(model, "transformers", tmp_path / "out")
    theirs = loaded(AutoModelForImageClassification, tmp_path / "out")
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, model.logits(images), rtol=0, atol=1e-5)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "red panda"}
    assert theirs.config.label2id == {"cat": 0, "dog": 1, "red panda": 2}
    assert list(exported.left_behind) == []


def test_files_have_the_names_that_all_versions_read(tmp_path: Path) -> None:
    export(autoencoder(SQUARE, (8, 8), 3), "transformers", tmp_path / "encoder")
    export(classifier(), "transformers", tmp_path / "classifier")
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(load_file(tmp_path / "encoder" / "model.safetensors")) == encoder_names("") | pooler
    head = {"classifier.weight", "classifier.bias"}
    assert set(load_file(tmp_path / "classifier" / "model.safetensors")) == encoder_names("vit.") | head
    assert config(tmp_path / "encoder")["architectures"] == ["ViTModel"]
    assert config(tmp_path / "classifier")["architectures"] == ["ViTForImageClassification"]
    # Version 4 fails on a header without it.
    assert b'"format":"pt"' in (tmp_path / "encoder" / "model.safetensors").read_bytes()[:400]


@pytest.mark.parametrize(("head", "pool"), [("mlp", "cls"), ("mlp", "cls+avg"), ("linear", "cls+avg")])
def test_a_head_that_transformers_does_not_have_is_left_behind(tmp_path: Path, head: Any, pool: TokenKind) -> None:
    from transformers import AutoModel

    model = classifier(head, pool)
    exported = export(model, "transformers", tmp_path / "out")
    assert list(exported.left_behind) == model.head_names != []
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        output = loaded(AutoModel, tmp_path / "out")(images)
    torch.testing.assert_close(output.last_hidden_state, model.tokens(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, model.tokens(images)[:, 0], rtol=0, atol=1e-5)
    assert "id2label" not in config(tmp_path / "out")


def test_a_model_that_norms_the_mean_of_its_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"norms the mean .*; export it to transformers_code or timm, or .*pool: cls"):
        export(classifier(pool="avg"), "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["transformers", "transformers_code", "vit_mae"])
def test_a_model_of_images_of_more_than_8_bits_is_refused(tmp_path: Path, target: str) -> None:
    model = autoencoder(SQUARE, (8, 8), 3) if target == "vit_mae" else classifier()
    deep = trained(dict(model.weights), replace(model.description, value_range=(0.0, 4095.0)))
    with pytest.raises(UserError, match=r"value_range, which transformers.*; export it to timm"):
        export(deep, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def without_a_tensor(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != "layernorm.bias"}


def with_another_value(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"layernorm.bias": weights["layernorm.bias"] + 1e-3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, r"does not load what was exported: missing_keys: {'layernorm.bias'}; nothing was exported"),
        (with_another_value, r"the tokens of the export to transformers differ by .*; nothing was exported"),
    ],
)
def test_a_folder_that_transformers_reads_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str
) -> None:
    from mae.formats.transformers_vit import to_transformers

    monkeypatch.setattr(
        "mae.export.transformers_vit.to_transformers", lambda weights, kind: damage(to_transformers(weights, kind))
    )
    with pytest.raises(UserError, match=message):
        export(autoencoder(SQUARE, (8, 8), 3), "transformers", tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def photo(height: int, width: int, kind: str) -> bytes:
    """A smooth picture with some grain."""
    rows, columns = np.mgrid[:height, :width] / 8
    waves = [np.sin(rows + phase) * np.cos(columns * (phase + 1)) for phase in (0.0, 0.6, 1.1)]
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels = (128 + 90 * np.stack(waves, axis=2) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def of_size_32(target: str, out: Path) -> TrainedModel:
    """An exported classifier, which resizes the short side of images to 40 pixels."""
    model = classifier(image_size=(32, 32))
    model = trained(dict(model.weights), replace(model.description, crop_pct=0.8))
    export(model, target, out)
    return model


# Sizes at which our crop begins at a whole pixel.
@pytest.mark.parametrize(
    ("target", "height", "width"), [("transformers", 50, 75), ("transformers", 20, 14), ("timm", 80, 50)]
)
def test_the_pipeline_finds_our_class_in_a_photo(tmp_path: Path, target: str, height: int, width: int) -> None:
    from transformers import pipeline

    ours = mae.load(of_size_32(target, tmp_path / "out").path, device="cpu")
    theirs = pipeline("image-classification", str(tmp_path / "out"), device="cpu")
    for kind, allowed in (("png", 1e-4), ("jpeg", 1e-2)):
        data = photo(height, width, kind)
        probabilities = ours.logits([data]).softmax(dim=1)[0].tolist()
        expected = dict(zip(ours.classes, probabilities, strict=True))
        found = theirs(Image.open(io.BytesIO(data)))
        assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=allowed)
        assert found[0]["label"] == max(expected, key=expected.__getitem__)


def test_an_odd_crop_begins_at_most_one_pixel_further_up_or_left(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    model = of_size_32("transformers", tmp_path / "out")
    data = photo(40, 47, "png")
    prepared = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.open(io.BytesIO(data)), return_tensors="pt")[
        "pixel_values"
    ][0]
    pixels = (prepared * 0.2 + 0.4) * 255
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).float()
    torch.testing.assert_close(pixels, whole[:, 4:36, 7:39], rtol=0, atol=1e-3)
    ours = mae.load(model.path, device="cpu").view(data).float()
    torch.testing.assert_close(ours, whole[:, 4:36, 8:40], rtol=0, atol=0)


def test_a_gray_image_is_prepared_as_we_do_and_the_pipeline_refuses_the_model(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, pipeline

    model = classifier(channels=1)
    export(model, "transformers", tmp_path / "out")
    image = Image.open(io.BytesIO(photo(24, 30, "png"))).convert("L")
    file = io.BytesIO()
    image.save(file, "png")
    prepared = AutoImageProcessor.from_pretrained(tmp_path / "out")(image, return_tensors="pt")["pixel_values"][0]
    ours = mae.load(model.path, device="cpu").view(file.getvalue()) / 255
    torch.testing.assert_close(prepared, (ours - 0.4) / 0.2, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Expected 1 but got 3"):
        pipeline("image-classification", str(tmp_path / "out"), device="cpu")(image)


def test_an_array_of_five_channels_is_prepared_as_we_do_and_the_pipeline_refuses_the_model(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, pipeline

    export(classifier(channels=5), "transformers", tmp_path / "out")
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    prepared = processor(array, input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepared, (torch.from_numpy(array) / 255 - 0.4) / 0.2, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="must match the size"):
        pipeline("image-classification", str(tmp_path / "out"), device="cpu")(Image.new("RGB", (8, 8)))


def test_a_rectangle_takes_images_of_its_own_size_only(tmp_path: Path) -> None:
    """One number for the short side cannot say how an image covers a rectangle."""
    from transformers import pipeline

    model = classifier(settings=RECTANGLE, image_size=(8, 12))
    model = trained(dict(model.weights), replace(model.description, crop_pct=1.0))
    export(model, "transformers", tmp_path / "out")
    theirs = pipeline("image-classification", str(tmp_path / "out"), device="cpu")
    data = photo(8, 12, "png")
    prediction = theirs(Image.open(io.BytesIO(data)))
    expected = mae.load(model.path, device="cpu").logits([data]).softmax(dim=1)[0]
    assert prediction[0]["score"] == pytest.approx(float(expected.max()), abs=1e-4)
    with pytest.raises(ValueError, match="doesn't match model"):
        theirs(Image.new("RGB", (40, 30)))


def test_transformers_loads_the_classifier_in_a_timm_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = classifier()
    export(model, "timm", tmp_path / "out")
    theirs = loaded(AutoModelForImageClassification, tmp_path / "out")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, model.logits(images), rtol=0, atol=1e-6)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "red panda"}


def test_a_new_head_is_fine_tuned_on_the_exported_encoder(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    model = autoencoder(SQUARE, (8, 8), 3)
    export(model, "transformers", tmp_path / "out")
    theirs, report = ViTForImageClassification.from_pretrained(tmp_path / "out", num_labels=7, output_loading_info=True)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert report["unexpected_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        tokens = theirs.eval().vit(images).last_hidden_state
    torch.testing.assert_close(tokens, model.tokens(images), rtol=0, atol=1e-5)
    assert theirs(images).logits.shape == (2, 7)


@pytest.mark.parametrize("target", ["transformers", "vit_mae"])
def test_what_is_exported_is_read_back_unchanged(tmp_path: Path, target: str) -> None:
    model = autoencoder(SQUARE, (32, 32), 3) if target == "vit_mae" else classifier(image_size=(32, 32))
    export(model, target, tmp_path / "out")
    back = mae.load(tmp_path / "out", device="cpu")
    weights = file_tensors(back.network)
    assert weights.keys() == model.weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.weights.items())
    # The share of a crop is kept as whole pixels.
    assert math.floor(32 / back.description.crop_pct) == math.floor(32 / model.description.crop_pct)
    assert replace(back.description, crop_pct=0.9) == model.description
