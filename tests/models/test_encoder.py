import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.encoder import build_encoder, encode_visible
from mae.models.masking import make_mask
from mae.models.patches import patchify, take
from mae.models.positions import sincos_positions
from mae.models.settings import EncoderSettings

TINY = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
RECTANGLE = EncoderSettings(width=16, depth=2, heads=2, patch_size=(2, 4))


def tiny_encoder(
    settings: EncoderSettings = TINY, image_size: tuple[int, int] = (12, 16), channels: int = 3
) -> VisionTransformer:
    torch.manual_seed(0)
    return build_encoder(settings, image_size, channels)


def images_for(channels: int = 3, image_size: tuple[int, int] = (12, 16)) -> Tensor:
    return torch.randn(2, channels, *image_size, generator=torch.Generator().manual_seed(1))


def encode(encoder: VisionTransformer, images: Tensor, ids_keep: Tensor) -> Tensor:
    """The normed tokens of the patches at `ids_keep`."""
    visible = take(patchify(images, encoder.patch_embed.proj.kernel_size), ids_keep)
    return encoder.norm(encode_visible(encoder, visible, ids_keep)[-1])


def test_state_dict_is_timms() -> None:
    ours = build_encoder(EncoderSettings(size="tiny"), (224, 224), 3).state_dict()
    timms = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in timms.items()}
    assert list(ours) == list(timms)


@pytest.mark.parametrize("settings", [TINY, RECTANGLE])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_all_patches_kept_in_order_give_timms_forward(settings: EncoderSettings, channels: int) -> None:
    encoder, images = tiny_encoder(settings, channels=channels), images_for(channels)
    nn.init.normal_(encoder.pos_embed)
    everything = torch.arange(encoder.pos_embed.shape[1] - 1).expand(2, -1)
    torch.testing.assert_close(encode(encoder, images, everything), encoder.forward_features(images))


@pytest.mark.parametrize("settings", [TINY, RECTANGLE])
@pytest.mark.parametrize("channels", [1, 3])
def test_embedding_the_kept_patches_is_gathering_from_timms_embedding(settings: EncoderSettings, channels: int) -> None:
    encoder, images = tiny_encoder(settings, channels=channels), images_for(channels)
    nn.init.normal_(encoder.pos_embed)
    embedded = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    ids_keep = make_mask(torch.rand(embedded.shape[:2]), encoder.patch_embed.grid_size, "random", 4).ids_keep
    visible = torch.stack([tokens[kept] for tokens, kept in zip(embedded, ids_keep, strict=True)])
    cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    expected = encoder.norm(encoder.blocks(torch.cat([cls_token, visible], dim=1)))
    torch.testing.assert_close(encode(encoder, images, ids_keep), expected)


def test_encoded_patches_stand_in_the_order_of_ids_keep() -> None:
    encoder, images = tiny_encoder(), images_for()
    ids_keep = torch.tensor([[7, 2, 5], [0, 11, 3]])
    order = torch.tensor([2, 0, 1])
    encoded = encode(encoder, images, ids_keep)
    reordered = encode(encoder, images, ids_keep[:, order])
    torch.testing.assert_close(reordered[:, 1:], encoded[:, 1:][:, order])
    torch.testing.assert_close(reordered[:, 0], encoded[:, 0])


def test_every_layer_is_handed_on_from_the_embedding_to_the_last_block() -> None:
    encoder, images = tiny_encoder(), images_for()
    everything = torch.arange(12).expand(2, -1)
    layers = encode_visible(encoder, patchify(images, (4, 4)), everything)
    assert len(layers) == 1 + len(encoder.blocks)
    for block, before, after in zip(encoder.blocks, layers, layers[1:], strict=False):
        assert torch.equal(block(before), after)


def test_features_are_the_normed_cls_token() -> None:
    encoder, images = tiny_encoder(), images_for()
    features = encoder(images)
    assert features.shape == (2, 16)
    assert torch.equal(features, encoder.forward_features(images)[:, 0])
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2), rtol=0, atol=1e-6)


def test_positions_are_the_sine_cosine_table_and_frozen() -> None:
    encoder = tiny_encoder()
    assert torch.equal(encoder.pos_embed, sincos_positions((3, 4), 16))
    assert encoder.pos_embed.any()
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_linear_weights_fill_the_xavier_interval_and_biases_are_zero() -> None:
    encoder = tiny_encoder()
    layers = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound, name
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
        assert not layer.bias.any(), name


def test_the_patch_embedding_is_initialised_as_a_linear_layer_over_the_pixels() -> None:
    projection = tiny_encoder(channels=5).patch_embed.proj
    bound = math.sqrt(6 / (5 * 4 * 4 + 16))
    assert 0.9 * bound < projection.weight.abs().max() <= bound
    assert not projection.bias.any()


def test_norms_start_as_the_identity() -> None:
    norms = [module for module in tiny_encoder().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    assert all((norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-6 for norm in norms)


def test_the_cls_token_starts_with_a_deviation_of_two_hundredths() -> None:
    torch.manual_seed(0)
    cls_token = build_encoder(EncoderSettings(width=1024, depth=1, heads=1), (16, 16), 1).cls_token
    assert cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(cls_token.mean().item()) < 0.002


def test_drop_path_rises_linearly_to_its_value_at_the_last_block() -> None:
    settings = EncoderSettings(width=8, depth=3, heads=1, patch_size=(4,))
    blocks = build_encoder(settings, (8, 8), 3, drop_path=0.2).blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert blocks[-1].drop_path2.drop_prob == pytest.approx(0.2)


def test_without_drop_path_training_and_evaluation_give_the_same() -> None:
    encoder, images = tiny_encoder(), images_for()
    assert torch.equal(encoder.train()(images), encoder.eval()(images))
