import inspect
import re
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.errors import UserError
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.sizes import SIZES


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
        *(("model.position_temperature", {"position_temperature": bad}) for bad in (1.0, 0.0, -10.0)),
        ("model.position_temperature", {"position_temperature": float("inf")}),
        ("model.position_temperature", {"position_temperature": float("nan")}),
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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"heads": 7}, "a divisor of the width 768: 6 or 8; or set model.width to 756 or 784"),
        ({"heads": 0}, "a divisor of the width 768: 1"),
        ({"heads": 800}, "a divisor of the width 768: 768; or set model.width to 800"),
        ({"width": 100}, "a divisor of the width 100: 10 or 20; or set model.width to 96 or 108"),
        ({"width": 770}, "a multiple of 4 (2-D sine-cosine positions): 768 or 772"),
        ({"width": -4}, "a multiple of 4 (2-D sine-cosine positions): 4"),
        ({"decoder_heads": 7}, "a divisor of the width 512: 4 or 8; or set model.decoder_width to 504 or 532"),
        ({"decoder_width": 511}, "a multiple of 4 (2-D sine-cosine positions): 508 or 512"),
    ],
)
def test_the_nearest_valid_widths_and_heads_are_named_k03(values: dict[str, int], words: str) -> None:
    with pytest.raises(UserError) as error:
        MaskedAutoencoderSettings(**values)
    assert str(error.value).endswith(f"; allowed: {words}")


@pytest.mark.parametrize(
    ("patch", "image_size", "words"),
    [
        (
            (16,),
            (225, 225),
            "225x225 (data.image_size): nearest 15 or 25 high, 15 or 25 wide; or set "
            "data.image_size to 224 or 240 high, 224 or 240 wide",
        ),
        (
            (16,),
            (224, 200),
            "224x200 (data.image_size): nearest 16 high, 10 or 20 wide; "
            "or set data.image_size to 224 or 240 high, 192 or 208 wide",
        ),
        (
            (16, 8),
            (8, 97),
            "8x97 (data.image_size): nearest 8 high, 1 or 97 wide; or set data.image_size to 16 high, 96 or 104 wide",
        ),
    ],
)
def test_the_nearest_patches_that_divide_are_named_for_each_side_k03(
    patch: tuple[int, ...], image_size: tuple[int, int], words: str
) -> None:
    with pytest.raises(UserError, match=rf"^model\.patch_size is {patch[0]}x{patch[-1]}; allowed: ") as error:
        EncoderSettings(patch_size=patch).grid(image_size)
    assert str(error.value).endswith(words)


@pytest.mark.parametrize(("image_size", "mask_ratio"), [((16, 16), 0.8), ((32, 32), 1e-20), ((16, 40), 0.9)])
def test_keeping_or_hiding_no_patch_is_refused(image_size: tuple[int, int], mask_ratio: float) -> None:
    settings = MaskedAutoencoderSettings(patch_size=(8,), mask_ratio=mask_ratio)
    with pytest.raises(UserError, match=r"model\.mask_ratio .* at least 1 "):
        settings.check_image_size(image_size)


@pytest.mark.parametrize("mask", ["random", "block"])
@given(rows=st.integers(1, 60), columns=st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_both_ends_of_the_range_of_mask_ratios_are_allowed_and_what_is_beyond_is_not_n07(
    mask: Any, rows: int, columns: int
) -> None:
    with pytest.raises(UserError) as error:
        MaskedAutoencoderSettings(mask=mask, patch_size=(1,), mask_ratio=1 - 1e-12).check_image_size((rows, columns))
    found = re.search(r"allowed: from (\S+) to (\S+), ", str(error.value))
    assert found
    for ratio in map(float, found.groups()):
        MaskedAutoencoderSettings(mask=mask, patch_size=(1,), mask_ratio=ratio).check_image_size((rows, columns))
    more = float(found[2]) + 2 / 10 ** len(found[2].partition(".")[2])
    with pytest.raises(UserError, match="mask_ratio"):
        MaskedAutoencoderSettings(mask=mask, patch_size=(1,), mask_ratio=more).check_image_size((rows, columns))


@pytest.mark.parametrize(
    ("image_size", "mask_ratio", "words"),
    [((48, 48), 0.7, "6x6 patches .*: 0.75, 0.8889, 0.9722$"), ((40, 24), 0.75, "5x3 patches .*: none does$")],
)
def test_the_ratios_of_a_grid_mask_are_named_n07(image_size: tuple[int, int], mask_ratio: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        MaskedAutoencoderSettings(mask="grid", mask_ratio=mask_ratio, patch_size=(8,)).check_image_size(image_size)


def test_an_image_of_a_single_patch_cannot_be_pretrained_on_k03() -> None:
    with pytest.raises(UserError, match=r"^model\.patch_size is 16x8; allowed: less than the image"):
        MaskedAutoencoderSettings(patch_size=(16, 8)).check_image_size((16, 8))


def test_the_defaults_fit_the_papers_image() -> None:
    settings = MaskedAutoencoderSettings()
    settings.check_image_size((224, 224))
    assert settings.grid((224, 224)) == (14, 14)
