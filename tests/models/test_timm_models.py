"""Names of timm models as sizes."""

import sys

import pytest
import timm
import torch

from mae.errors import UserError
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings


@pytest.mark.parametrize(
    ("name", "image_size", "patch"),
    [
        ("vit_small_patch32_384", 384, (32, 32)),
        ("deit_tiny_patch16_224", 224, (16, 16)),
    ],
)
def test_a_plain_vit_of_timm_is_built_by_its_name(name: str, image_size: int, patch: tuple[int, int]) -> None:
    settings = EncoderSettings(size=name)
    with torch.device("meta"):
        ours = build_encoder(settings, (image_size, image_size), 3)
        theirs = timm.create_model(name, num_classes=0)
    shapes = {tensor: value.shape for tensor, value in theirs.state_dict().items()}
    assert {tensor: value.shape for tensor, value in ours.state_dict().items()} == shapes
    assert settings.patch == patch
    assert settings.shape.heads == theirs.blocks[0].attn.num_heads


def test_patch_and_shape_may_be_set_beside_a_name() -> None:
    settings = MaskedAutoencoderSettings(size="vit_small_patch32_224", patch_size=(8, 4), depth=2, width=192)
    assert (settings.patch, settings.shape) == ((8, 4), (192, 2, 6))
    assert settings.decoder_shape == MaskedAutoencoderSettings(size="tiny").decoder_shape


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_base_patch16_gap_224", "its pooling is avg instead of token"),
        ("flexivit_small", r"its pos_embed is \[1, 225, 384\] instead of \[1, 226, 384\]"),
        ("test_vit", r"its blocks\.0\.mlp\.fc1\.weight is \[192, 64\] instead of \[256, 64\]"),
        ("test_vit2", "it has reg_token"),
        ("vit_small_patch16_18x2_224", r"it has blocks\.0\.attns"),
        ("vit_base_patch16_224_miil", r"its blocks\.0\.attn\.qkv is Linear.*bias=False.* instead of .*bias=True"),
        ("vit_xsmall_patch16_clip_224", r"it has norm_pre\.weight"),
        ("deit_tiny_distilled_patch16_224", "its class is VisionTransformerDistilled"),
    ],
)
def test_another_kind_of_vit_is_refused_by_what_differs_k03(name: str, part: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.size is {name}, which is not a plain ViT: .*{part}") as error:
        EncoderSettings(size=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bas", "did you mean base?"),
        ("vit_base_patch16_224.mae", "did you mean vit_base_patch16_224? A name means a shape, no weights are loaded"),
        ("resnet50", "such as vit_base_patch8_224"),
        ("hf-hub:timm/resnet50", "such as vit_base_patch8_224"),
    ],
)
def test_an_unknown_size_is_refused_with_names_that_are_allowed_k03(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        EncoderSettings(size=name)
    assert str(error.value).startswith(f"model.size is {name}; allowed: tiny, small, base, large, huge, or a plain ViT")
    assert hint in str(error.value)


def test_every_name_that_is_offered_is_taken() -> None:
    with pytest.raises(UserError) as error:
        EncoderSettings(size="vit_tiny_patch16")
    offered = str(error.value).partition("did you mean ")[2].rstrip("?").split(" or ")
    assert len(offered) > 1
    assert all(EncoderSettings(size=name).shape.width > 0 for name in offered)


def test_the_sizes_of_the_table_do_not_need_timms_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to import."""
    monkeypatch.setitem(sys.modules, "mae.models.timm_models", None)
    assert EncoderSettings(size="tiny").patch == (16, 16)
    with pytest.raises(ImportError):
        EncoderSettings(size="vit_tiny_patch16_224")
