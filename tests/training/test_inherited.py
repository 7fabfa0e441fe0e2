"""The shape of a model to start with is the default of a fine-tuning's settings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae.errors import UserError
from mae.models.description import describe_model
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.models.weights import file_tensors, write_weights
from mae.settings import dump, parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.training.inherited import shape_of_init

ENCODER = EncoderSettings(width=16, depth=2, heads=2, patch_size=(2, 4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run of an encoder of gray images of 8x12 pixels."""
    torch.manual_seed(0)
    description = describe_model("masked autoencoder", ENCODER, (8, 12), (0.5,), (0.2,), 0.9)
    folder = tmp_path / "pre"
    folder.mkdir()
    write_weights(
        folder / "model.safetensors", file_tensors(build_encoder(ENCODER, (8, 12), 1)), description.metadata()
    )
    return folder


def settings_of(tmp_path: Path, *words: str) -> FinetuneSettings:
    return parse(FinetuneSettings, ["--run_dir", str(tmp_path / "run"), *words], prog="mae finetune")


def shape(settings: FinetuneSettings) -> tuple[object, ...]:
    return (
        *settings.model.shape,
        settings.model.patch,
        settings.data.size,
        settings.data.channels,
        settings.data.crop_pct,
    )


def test_the_shape_is_that_of_the_model(model: Path, tmp_path: Path) -> None:
    assert shape(settings_of(tmp_path, "--init", str(model))) == (16, 2, 2, (2, 4), (8, 12), 1, 0.9)
    assert shape(settings_of(tmp_path)) == (768, 12, 12, (16, 16), (224, 224), 3, 0.875)


def test_what_is_given_stays_in_flags_and_file(model: Path, tmp_path: Path) -> None:
    given = settings_of(
        tmp_path, f"--init={model}", "--data.image-size", "16", "--model.depth=3", "--data.crop_pct", "1"
    )
    assert shape(given) == (16, 3, 2, (2, 4), (16, 16), 1, 1.0)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"init: {model}\nmodel: {{size: tiny}}\ndata: {{image_size: 32}}\n")
    assert shape(settings_of(tmp_path, "--config", str(file))) == (192, 12, 3, (16, 16), (32, 32), 1, 0.9)


def test_the_temperature_of_the_positions_is_that_of_the_model_unless_it_is_given(tmp_path: Path) -> None:
    encoder = replace(ENCODER, position_temperature=10.0)
    description = describe_model("masked autoencoder", encoder, (8, 12), (0.5,), (0.2,), 0.9)
    file = tmp_path / "warm.safetensors"
    write_weights(file, file_tensors(build_encoder(encoder, (8, 12), 1)), description.metadata())
    of_size = ("--model.size", "tiny", "--data.image_size", "16")
    for words, expected in (((), 10.0), (of_size, 10.0), (("--model.position_temperature", "30"), 30.0)):
        assert settings_of(tmp_path, "--init", str(file), *words).model.position_temperature == expected


def test_a_run_keeps_its_shape_when_the_model_is_gone(model: Path, tmp_path: Path) -> None:
    words = ["--init", str(model), "--data.image_size", "16", "24"]
    first = settings_of(tmp_path, *words)
    first.run_dir.mkdir()
    (first.run_dir / "settings.yaml").write_text(dump(first))
    (model / "model.safetensors").unlink()
    assert settings_of(tmp_path, *words) == first
    with pytest.raises(UserError, match=r"pre holds no model.safetensors"):
        parse(FinetuneSettings, ["--run_dir", str(tmp_path / "other"), *words], prog="mae finetune")


def test_a_run_is_fine_tuned_beside_itself(model: Path, tmp_path: Path) -> None:
    words = ["--init", f"{model}/"]
    with pytest.raises(UserError, match="run_dir"):  # an export: perhaps in a folder of packages
        parse(FinetuneSettings, words, prog="mae finetune")
    (model / "settings.yaml").write_text("seed: 1\n")
    assert parse(FinetuneSettings, words, prog="mae finetune").run_dir == tmp_path / "pre-finetuned"
    assert settings_of(tmp_path, *words).run_dir == tmp_path / "run"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"data.image_size": "224"}, []),
        ({"data.image_size": "384"}, ["--data.crop_pct", "1.0"]),
        ({"data.image_size": "224 448"}, ["--data.crop_pct", "1.0"]),
    ],
)
def test_images_larger_than_published_are_not_cropped(
    given: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    assert shape_of_init(given) == expected
    assert shape_of_init(given | {"data.crop_pct": "0.9"}) == []
    # An older run, whose crop was the default then, keeps it.
    (tmp_path / "settings.yaml").write_text("data: {image_size: [384], crop_pct: 0.875}\n")
    assert shape_of_init(given | {"run_dir": str(tmp_path)})[-1:] == ["0.875"]
