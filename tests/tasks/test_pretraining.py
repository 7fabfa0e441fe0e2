"""Pretraining as a task: its unit, random numbers, arithmetic, model, batches and loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image

from mae.data.images.augment import AugmentSettings
from mae.data.images.decode import decode
from mae.data.loader import normalize
from mae.data.plan import plan_batches
from mae.data.settings import DataSettings
from mae.data.source import statistics_of
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.flops import autoencoder_flops
from mae.models.patches import patchify
from mae.models.settings import MaskedAutoencoderSettings
from mae.pipelines.pack import PackSettings
from mae.pipelines.pack import run as pack
from mae.tasks.baselines import measure_baselines
from mae.tasks.pretraining import Pretraining, PretrainSettings

MODEL = MaskedAutoencoderSettings(
    width=16, depth=1, heads=2, patch_size=(2,), decoder_width=8, decoder_depth=1, decoder_heads=2
)


@pytest.fixture
def task(make_shards: Callable[..., Path], tmp_path: Path) -> Callable[..., Pretraining]:
    """A function that opens a pretraining on nine gray images of 8x8 pixels."""
    shards = make_shards([5, 4])

    def make(model: MaskedAutoencoderSettings = MODEL, seed: int = 0, **data: Any) -> Pretraining:
        given = {"shards": (str(shards),), "channels": 1, "image_size": (8,), "workers": 0} | data
        settings = PretrainSettings(tmp_path / "run", seed=seed, data=DataSettings(**given), model=model)
        return Pretraining.open(settings, lambda text: None)

    return make


def test_the_views_of_an_image_stay_together(task: Callable[..., Pretraining]) -> None:
    assert [task(views_per_image=views).unit for views in (1, 3)] == [1, 3]


def test_each_patch_has_its_random_number(task: Callable[..., Pretraining]) -> None:
    for size, patches in (((8,), 16), ((8, 12), 24)):
        made = task(image_size=size)
        assert made.noise_columns == patches
        assert made.batches(plan_batches(4, 1, None), 0).starting_at(0)[0].noise.shape == (4, patches)


def test_its_arithmetic_is_that_of_training_the_whole_model(task: Callable[..., Pretraining]) -> None:
    assert task().flops_per_image == autoencoder_flops(MODEL, (8, 8), 1).training
    assert task(replace(MODEL, mask_ratio=0.5)).flops_per_image > task().flops_per_image


def test_it_finds_mean_and_std_and_describes_them_with_the_model(task: Callable[..., Pretraining]) -> None:
    made = task(crop_pct=0.9)
    description, statistics = made.description, statistics_of(made.settings.data)
    assert (description.kind, description.grid, description.channels) == ("masked autoencoder", (4, 4), 1)
    assert (description.mean, description.std) == (statistics.mean, statistics.std)
    assert statistics.mean[0] == pytest.approx(0.5, abs=0.1)
    assert description.crop_pct == 0.9
    assert description.decoder is not None


def test_the_seed_decides_the_starting_weights(task: Callable[..., Pretraining]) -> None:
    first, again, other = (task(seed=seed).build_model().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["encoder.patch_embed.proj.weight"], other["encoder.patch_embed.proj.weight"])


def test_the_groups_hold_every_trained_parameter_once(task: Callable[..., Pretraining]) -> None:
    made = task()
    model = made.build_model()
    groups = made.parameter_groups(model)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert {group["weight_decay"] for group in groups} == {0.0, made.settings.optim.weight_decay}
    assert {group["lr_scale"] for group in groups} == {1.0}


@pytest.mark.parametrize("images", [1, 3, 4])
def test_its_loss_is_the_model_s_of_normalised_images_under_their_noise(
    task: Callable[..., Pretraining], images: int
) -> None:
    made = task()
    batch = made.batches(plan_batches(images, 1, None), 0).starting_at(0)[0]
    model: MaskedAutoencoder = made.build_model()
    found = made.loss_of(images)(model, batch)
    assert (found.shape, found.dtype) == ((), torch.float32)
    expected = model(normalize(batch.images, statistics_of(made.settings.data)), batch.noise).loss
    assert torch.equal(found, expected)


WHOLE = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_baselines_are_those_of_two_constant_predictions(
    task: Callable[..., Pretraining], norm_pix_loss: bool
) -> None:
    """Compared with losses of the model itself, which predicts zeros and then the mean target of each place."""
    model = replace(MODEL, norm_pix_loss=norm_pix_loss)
    made = task(model, max_bad_samples=1)
    made = replace(made, settings=replace(made.settings, augment=WHOLE))
    found = measure_baselines(made)
    assert found is not None
    images = normalize(torch.stack([decode(png(number), 1) for number in range(9)]), statistics_of(made.settings.data))
    trained = MaskedAutoencoder(model, (8, 8), 1)
    pixels = patchify(images, (2, 2))
    mean = trained.target(pixels).mean(dim=0).expand_as(pixels)
    assert found.images == 9
    assert found.patch_mean == pytest.approx(trained.loss(pixels, torch.zeros_like(pixels)).item(), rel=1e-5)
    assert found.place_mean == pytest.approx(trained.loss(pixels, mean).item() * 9 / 8, rel=1e-5)


def test_flat_patches_lower_the_loss_of_predicting_their_mean(tmp_path: Path) -> None:
    """Their target is 0: with half of the patches flat, the loss is half of (P - 1) / P."""
    half = np.zeros((8, 8), np.uint8)
    half[:4] = np.arange(32).reshape(4, 8)
    folder = tmp_path / "halves"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(half + number).save(folder / f"{number}.png")
    pack(PackSettings(str(folder), tmp_path / "flat", workers=0))
    data = DataSettings(shards=(str(tmp_path / "flat"),), channels=1, image_size=(8,), workers=0)
    settings = PretrainSettings(tmp_path / "run", data=data, model=MODEL, augment=WHOLE)
    found = measure_baselines(Pretraining.open(settings, lambda text: None))
    assert found is not None
    assert found.patch_mean == pytest.approx(0.5 * 3 / 4, rel=1e-3)
    assert found.place_mean == pytest.approx(0, abs=1e-9)
