import inspect
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch

from mae.errors import UserError
from mae.models.settings import SIZES, EncoderSettings, MaskedAutoencoderSettings


@pytest.mark.parametrize(
    ("size", "timm_name"),
    [
        ("tiny", "vit_tiny_patch16_224"),
        ("small", "vit_small_patch16_224"),
        ("base", "vit_base_patch16_224"),
        ("large", "vit_large_patch16_224"),
        ("huge", "vit_huge_patch14_224"),
    ],
)
def test_sizes_are_timms(size: str, timm_name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    assert SIZES[size] == (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads)


def test_the_setting_offers_exactly_the_sizes_of_the_table() -> None:
    assert get_args(get_type_hints(EncoderSettings)["size"]) == tuple(SIZES)


def test_the_help_text_of_the_setting_repeats_the_table() -> None:
    source = inspect.getsource(EncoderSettings)
    assert [f"{name} {w}/{d}/{h}" in source for name, (w, d, h) in SIZES.items()] == [True] * len(SIZES)


def test_overrides_replace_one_number_of_the_size_each() -> None:
    assert EncoderSettings(size="small").shape == (384, 12, 6)
    assert EncoderSettings(size="small", width=96).shape == (96, 12, 6)
    assert EncoderSettings(size="small", depth=2).shape == (384, 2, 6)
    assert EncoderSettings(size="small", heads=3).shape == (384, 12, 3)


def test_one_number_is_a_square_patch_and_two_are_height_and_width() -> None:
    assert EncoderSettings(patch_size=(8,)).patch == (8, 8)
    assert EncoderSettings(patch_size=(4, 8)).patch == (4, 8)
    assert EncoderSettings(patch_size=(4, 8)).grid((16, 16)) == (4, 2)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("model.width", {"width": 18, "heads": 2}),
        ("model.width", {"width": 0, "heads": 1}),
        ("model.width", {"width": -4, "heads": 1}),
        ("model.depth", {"depth": 0}),
        ("model.heads", {"heads": 0}),
        ("model.heads", {"heads": 5}),
        ("model.heads", {"width": 16, "heads": 3}),
        ("model.patch_size", {"patch_size": ()}),
        ("model.patch_size", {"patch_size": (0,)}),
        ("model.patch_size", {"patch_size": (4, -4)}),
        ("model.patch_size", {"patch_size": (4, 4, 4)}),
        ("model.mask_ratio", {"mask_ratio": 0.0}),
        ("model.mask_ratio", {"mask_ratio": 1.0}),
        ("model.mask_ratio", {"mask_ratio": -0.5}),
        ("model.mask_ratio", {"mask_ratio": float("nan")}),
        ("model.decoder_width", {"decoder_width": 18, "decoder_heads": 2}),
        ("model.decoder_width", {"decoder_width": 0}),
        ("model.decoder_depth", {"decoder_depth": 0}),
        ("model.decoder_heads", {"decoder_heads": 0}),
        ("model.decoder_heads", {"decoder_heads": 5}),
    ],
)
def test_values_out_of_range_are_refused_by_name(setting: str, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{setting} is .*; allowed: "):
        MaskedAutoencoderSettings(**values)


@pytest.mark.parametrize("image_size", [(30, 32), (32, 30), (8, 32)])
def test_a_patch_that_does_not_divide_the_image_is_refused(image_size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"model\.patch_size .*{image_size[0]}x{image_size[1]}"):
        EncoderSettings(patch_size=(16,)).grid(image_size)
    with pytest.raises(UserError, match=r"model\.patch_size"):
        MaskedAutoencoderSettings(patch_size=(16,)).check_image_size(image_size)


@pytest.mark.parametrize(("image_size", "mask_ratio"), [((16, 16), 0.8), ((8, 8), 0.5), ((32, 32), 1e-20)])
def test_keeping_or_hiding_no_patch_is_refused(image_size: tuple[int, int], mask_ratio: float) -> None:
    settings = MaskedAutoencoderSettings(patch_size=(8,), mask_ratio=mask_ratio)
    with pytest.raises(UserError, match=r"model\.mask_ratio .* at least 1 "):
        settings.check_image_size(image_size)


def test_the_defaults_fit_the_papers_image() -> None:
    settings = MaskedAutoencoderSettings()
    settings.check_image_size((224, 224))
    assert settings.grid((224, 224)) == (14, 14)
