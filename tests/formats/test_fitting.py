"""Weights for other patches, channels and grids, by timm's rules."""

from pathlib import Path

import pytest
import torch
from timm.layers import resample_patch_embed
from timm.models._manipulate import adapt_input_conv

from formats.foreign import NORMALIZATION, published_file
from mae.formats.fitting import Fit, fit, for_channels
from mae.formats.opening import Normalization, open_model

PATCHES = "patch_embed.proj.weight"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return published_file(tmp_path / "whole.pth", whole=True)


def fitted(path: Path, grid: tuple[int, int], patch: tuple[int, int], channels: int) -> Fit:
    stored = open_model(path)
    return fit(stored.weights, stored.description, grid, patch, channels)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (3, 5), (3, 6), (1, 3), (5, 3), (5, 1), (4, 9)])
def test_channels_are_adapted_as_timm_does(old: int, new: int) -> None:
    if old != 3:
        pytest.importorskip("timm", "1.0.31", reason="earlier timm adapts weights of 3 channels only")
    weight, channels = torch.randn(6, old, 4, 4), {} if old == 3 else {"base_chans": old}
    torch.testing.assert_close(for_channels(weight, new), adapt_input_conv(new, weight.clone(), **channels))


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 6)])
def test_an_image_whose_channels_are_equal_gives_the_same(old: int, new: int) -> None:
    weight, image = torch.randn(6, old, 4, 4), torch.randn(2, 1, 8, 8)
    before = torch.nn.functional.conv2d(image.expand(-1, old, -1, -1), weight, stride=4)
    after = torch.nn.functional.conv2d(image.expand(-1, new, -1, -1), for_channels(weight, new), stride=4)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_other_patches_are_resampled_as_timm_does_and_the_decoder_begins_anew(whole: Path) -> None:
    before = open_model(whole).weights
    found = fitted(whole, (4, 8), (8, 4), 1)
    expected = resample_patch_embed(before[PATCHES], [8, 4]).sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.weights[PATCHES], expected)
    assert found.weights["pos_embed"].shape == (1, 33, 192)
    assert found.resampled == {
        "pos_embed": "4x4 to 4x8",
        PATCHES: "4x4 to 8x4 pixels, 3 to 1 channels",
    }
    assert set(found.dropped) == {name for name in before if name.startswith(("decoder_", "mask_token"))}


def test_a_decoder_stays_where_only_the_grid_is_another(whole: Path) -> None:
    found = fitted(whole, (2, 8), (4, 4), 3)
    assert found.dropped == {}
    assert set(found.resampled) == {"pos_embed", "decoder_pos_embed"}
    same = fitted(whole, (4, 4), (4, 4), 3)
    assert (same.resampled, same.dropped) == ({}, {})


def test_a_normalisation_is_given_for_each_channel(whole: Path) -> None:
    assert open_model(whole).description.mean == ()
    assert open_model(whole, Normalization(**NORMALIZATION)).description.mean == NORMALIZATION["mean"]
