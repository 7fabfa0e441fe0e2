"""Beginning from the model of an earlier run: what has to be as it was, and what is said of the rest."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mae.data.settings import DataSettings
from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.description import describe_model
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.weights import file_tensors, has_decoder, load_autoencoder, write_weights
from mae.training.origin import Origin, find_origin, inherit_normalization
from mae.training.run_folder.folder import RunFolder

SHAPE: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch_size": (4,)}
SETTINGS = MaskedAutoencoderSettings(**SHAPE, decoder_width=12, decoder_depth=1, decoder_heads=3)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
DATA = DataSettings(image_size=(16,))


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    description = describe_model("masked autoencoder", SETTINGS, (16, 16), MEAN, STD, 1.0)
    weights = file_tensors(MaskedAutoencoder(SETTINGS, (16, 16), 3))
    write_weights(tmp_path / "model.safetensors", weights, description.metadata())
    return tmp_path


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    encoder = EncoderSettings(**SHAPE)
    description = describe_model("classifier", encoder, (16, 16), MEAN, STD, 1.0)
    weights = file_tensors(build_classifier(encoder, (16, 16), 3, 5, "mlp"))
    write_weights(tmp_path / "model.safetensors", weights, description.metadata())
    return tmp_path


def origin_of(folder: Path) -> Origin:
    origin = find_origin(str(folder), RunFolder(folder / "run"))
    assert origin is not None
    return origin


def test_none_is_no_origin_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    assert find_origin("none", RunFolder(tmp_path)) is None
    with pytest.raises(UserError, match=r"^no/such/run does not exist; give "):
        find_origin("no/such/run", RunFolder(tmp_path))


def test_a_run_that_has_a_checkpoint_does_not_ask_for_it_any_more(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000000003").mkdir(parents=True)
    assert find_origin("no/such/run", RunFolder(tmp_path)) is None


@pytest.mark.parametrize("settings", [SETTINGS, EncoderSettings(**SHAPE)])
def test_mean_and_std_are_the_models_and_nothing_is_said_of_a_model_that_fits(
    settings: EncoderSettings, autoencoder: Path
) -> None:
    said: list[str] = []
    assert inherit_normalization(origin_of(autoencoder), settings, DATA, said.append) == replace(
        DATA, mean=MEAN, std=STD
    )
    assert said == []


def test_mean_and_std_that_are_set_stay_and_the_difference_is_said(autoencoder: Path) -> None:
    said: list[str] = []
    data = replace(DATA, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert inherit_normalization(origin_of(autoencoder), SETTINGS, data, said.append) == data
    assert said == [
        f"data.mean and data.std differ from {MEAN} and {STD}, which {autoencoder}/model.safetensors was trained with"
    ]


def test_another_image_size_is_said_and_the_weights_come_for_its_grid(autoencoder: Path) -> None:
    said: list[str] = []
    origin = origin_of(autoencoder)
    inherit_normalization(origin, SETTINGS, replace(DATA, image_size=(24, 32)), said.append)
    assert said == [
        f"{origin.path} was trained on images of 16x16, data.image_size is 24x32: its positions are resampled"
    ]
    weights = origin.weights(SETTINGS.grid((24, 32)))
    assert (weights["pos_embed"].shape, weights["decoder_pos_embed"].shape) == ((1, 49, 16), (1, 49, 12))


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"depth": 3}, "depth 2, settings ask for 3"),
        ({"position_temperature": 10.0}, r"position_temperature 10000\.0, settings ask for 10\.0"),
        ({"width": 32, "heads": 4}, "width 16, settings ask for 32; heads 2, settings ask for 4"),
    ],
)
def test_another_encoder_is_refused(changed: dict[str, Any], difference: str, autoencoder: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^init {autoencoder} was trained with {difference}; set model\.\* to the same"
    ):
        inherit_normalization(origin_of(autoencoder), replace(SETTINGS, **changed), DATA, print)


@pytest.mark.parametrize(
    ("patch", "channels", "change"),
    [
        ((8, 4), 3, r"patches of 4x4 (model.patch_size is 8x4)"),
        ((4,), 5, "3 channels (data.channels is 5; its mean and std are not used)"),
        (
            (8,),
            1,
            "patches of 4x4 (model.patch_size is 8x8) and "
            "3 channels (data.channels is 1; its mean and std are not used)",
        ),
    ],
)
def test_other_patches_and_channels_are_adapted_and_the_decoder_begins_anew(
    patch: tuple[int, ...], channels: int, change: str, autoencoder: Path
) -> None:
    said: list[str] = []
    origin, settings = origin_of(autoencoder), replace(SETTINGS, patch_size=patch, decoder_depth=2)
    data = inherit_normalization(origin, settings, replace(DATA, channels=channels), said.append)
    assert said == [
        f"{origin.path} was trained with {change}: its patch embedding is adapted",
        f"the decoder of {origin.path} predicts other pixels: its encoder gets a new one",
    ]
    assert data.mean == (MEAN if channels == 3 else None)
    model = MaskedAutoencoder(settings, (16, 16), channels)
    weights = origin.weights(model.grid, settings.patch, channels)
    load_autoencoder(model, weights, origin.path)
    assert torch.equal(model.encoder.patch_embed.proj.weight, weights["patch_embed.proj.weight"])
    report = origin.report(file_tensors(model), replace(DATA, channels=channels), settings)
    assert report is not None
    assert set(report.resampled) == {"patch_embed.proj.weight", *(["pos_embed"] if patch != (4,) else [])}
    assert set(report.left_out.values()) == {"decoder, which predicts other pixels"}
    assert {*report.loaded, *report.new} == set(file_tensors(model))
    assert all(has_decoder([name]) for name in report.new)


def test_the_temperature_of_another_librarys_positions_is_not_known(autoencoder: Path) -> None:
    published = autoencoder / "published.pth"
    torch.save({"model": origin_of(autoencoder).weights((4, 4))}, published)
    origin = find_origin(str(published), RunFolder(autoencoder / "run"), heads=2)
    assert origin is not None
    settings = EncoderSettings(**SHAPE, position_temperature=10.0)
    data = replace(DATA, mean=MEAN, std=STD)
    assert inherit_normalization(origin, settings, data, print) == data


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"decoder": "cross"}, "kind self, settings ask for cross"),
        ({"decoder_width": 24, "decoder_depth": 2}, "width 12, settings ask for 24; depth 1, settings ask for 2"),
        ({"decoder_heads": 4}, "heads 3, settings ask for 4"),
    ],
)
def test_another_decoder_is_refused_with_the_way_to_a_new_one(
    changed: dict[str, Any], difference: str, autoencoder: Path
) -> None:
    """Its heads do not show in the shapes of its tensors."""
    with pytest.raises(UserError, match=rf"has a decoder of {difference}; set model\.decoder\* .* mae export"):
        inherit_normalization(origin_of(autoencoder), replace(SETTINGS, **changed), DATA, print)
    assert inherit_normalization(origin_of(autoencoder), EncoderSettings(**SHAPE), DATA, print).mean == MEAN


@pytest.mark.parametrize("changed", [{"mask": "grid"}, {"mask_ratio": 0.5}, {"predict_ratio": 0.5}])
def test_another_task_is_none_of_the_weights(changed: dict[str, Any], autoencoder: Path) -> None:
    said: list[str] = []
    inherit_normalization(origin_of(autoencoder), replace(SETTINGS, **changed), DATA, said.append)
    assert said == []


def test_another_target_is_said(autoencoder: Path) -> None:
    said: list[str] = []
    inherit_normalization(origin_of(autoencoder), replace(SETTINGS, norm_pix_loss=False), DATA, said.append)
    assert said == [f"the decoder of {autoencoder}/model.safetensors learned another target: model.norm_pix_loss True"]


def test_a_decoder_that_is_not_described_is_told_by_its_tensors(autoencoder: Path) -> None:
    """As in files from before decoders were described."""
    origin = origin_of(autoencoder)
    old = replace(origin, model=replace(origin.model, decoder=None))
    said: list[str] = []
    inherit_normalization(old, replace(SETTINGS, decoder_depth=2), DATA, said.append)
    assert old.has_decoder
    assert said == []


def test_the_model_of_a_classifier_has_no_decoder_and_that_is_said(classifier: Path) -> None:
    said: list[str] = []
    origin = origin_of(classifier)
    inherit_normalization(origin, SETTINGS, DATA, said.append)
    assert said == [f"{origin.path} holds no decoder: its encoder gets a new one"]
    assert "head.fc1.weight" in origin.weights((4, 4))
