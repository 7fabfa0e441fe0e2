"""The cross decoder against a slow, obvious implementation; presets and starting weights of both."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.encoder import encode_visible
from mae.models.patches import patchify, take
from mae.models.positions import sincos_positions
from mae.models.settings import MaskedAutoencoderSettings

Build = Callable[..., MaskedAutoencoder]
Draw = Callable[..., tuple[Tensor, Tensor]]


def norm(module: nn.LayerNorm, vector: Tensor) -> Tensor:
    return layer_norm(vector, vector.shape, module.weight, module.bias, 1e-6)


def slow_cross_decoder(model: MaskedAutoencoder, layers: list[Tensor], image: int, patch: int) -> Tensor:
    """The pixels of one patch of one image: one query, one head, one visible token at a time."""
    decoder = model.decoder
    token = decoder.mask_token[0, 0] + decoder.decoder_pos_embed[0, 1 + patch]
    for number, block in enumerate(decoder.decoder_blocks):
        mix = sum(weight * layer[image] for weight, layer in zip(decoder.decoder_mix[number], layers, strict=True))
        attention, heads = block.cross_attn, block.cross_attn.heads
        query = attention.q(norm(block.norm1, token)).chunk(heads)
        gathered = []
        for head in range(heads):
            scores, values = [], []
            for visible in mix:
                key, value = attention.kv(norm(decoder.decoder_norms[number], visible)).chunk(2)
                scores.append(query[head] @ key.chunk(heads)[head] / math.sqrt(len(query[head])))
                values.append(value.chunk(heads)[head])
            weights = torch.stack(scores).exp()
            gathered.append(sum(w / weights.sum() * value for w, value in zip(weights, values, strict=True)))
        token = token + attention.proj(torch.cat(gathered))
        hidden = gelu(linear(norm(block.norm2, token), block.mlp.fc1.weight, block.mlp.fc1.bias))
        token = token + linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return decoder.decoder_pred(norm(decoder.decoder_norm, token))


@pytest.mark.parametrize("predict_ratio", [1.0, 0.4])
def test_the_cross_decoder_is_the_slow_one(tiny_autoencoder: Build, draw: Draw, predict_ratio: float) -> None:
    model = tiny_autoencoder(decoder="cross", decoder_depth=2, predict_ratio=predict_ratio)
    for parameter in model.parameters():  # no zeros and ones that would hide a mistake
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    images, noise = draw(model)
    _, predicted, ids = model(images, noise)
    keep = model.mask(noise).ids_keep
    layers = encode_visible(model.encoder, take(patchify(images, model.patch_size), keep), keep)
    assert predicted.shape[1] == model.predicted == round(12 * predict_ratio)
    for image in range(len(images)):
        for place, patch in enumerate(ids[image].tolist()):
            torch.testing.assert_close(predicted[image, place], slow_cross_decoder(model, layers, image, patch))


def test_predictions_of_the_cross_decoder_do_not_depend_on_each_other(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder(decoder="cross")
    images, noise = draw(model)
    mask = model.mask(noise)
    fewer = mask._replace(ids_hidden=mask.ids_hidden[:, :5])
    torch.testing.assert_close(model(images, fewer).predicted, model(images, mask).predicted[:, :5])


def test_decoder_positions_are_the_table_and_the_mask_token_is_drawn(tiny_autoencoder: Build) -> None:
    for kind in ("self", "cross"):
        decoder = tiny_autoencoder(image_size=(8, 16), decoder=kind, decoder_width=512, decoder_heads=1).decoder
        assert torch.equal(decoder.decoder_pos_embed, sincos_positions((2, 4), 512))
        assert not decoder.decoder_pos_embed.requires_grad
        assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.15)


def test_each_block_begins_with_a_mix_of_its_own(tiny_autoencoder: Build) -> None:
    decoder = tiny_autoencoder(decoder="cross", depth=24, decoder_depth=12).decoder
    assert decoder.decoder_mix.shape == (12, 25)
    assert decoder.decoder_mix.std().item() == pytest.approx(25**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": "tiny"}, (192, 4, 6)),
        ({"size": "small"}, (256, 8, 8)),
        ({"size": "base"}, (512, 8, 16)),
        ({"size": "huge"}, (512, 8, 16)),
        ({"size": "base", "decoder": "cross"}, (512, 12, 16)),
        ({"size": "tiny", "decoder": "cross"}, (192, 6, 6)),
        ({"width": 64, "heads": 4}, (192, 4, 6)),
        ({"size": "small", "decoder_depth": 1}, (256, 1, 8)),
        ({"size": "small", "decoder_width": 128, "decoder_heads": 4}, (128, 8, 4)),
    ],
)
def test_the_decoder_follows_the_encoder_where_it_is_not_set(
    given: dict[str, object], expected: tuple[int, int, int]
) -> None:
    assert MaskedAutoencoderSettings(**given).decoder_shape == expected
