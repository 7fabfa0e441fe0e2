"""The same weights, images and noise through `transformers`' model, an independent implementation."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae.models.autoencoder import MaskedAutoencoder

Build = Callable[..., MaskedAutoencoder]
Draw = Callable[..., tuple[Tensor, Tensor]]

# Our names in a file -> the names of the weights `transformers` publishes.
RENAMED = [
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_pos_embed|decoder_embed|decoder_norm|decoder_pred)", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]

CASES: list[dict[str, Any]] = [
    {"image_size": (16, 16), "channels": 3, "patch_size": (4,), "mask_ratio": 0.75},
    {"image_size": (12, 12), "channels": 1, "patch_size": (2,), "mask_ratio": 0.6, "width": 24, "heads": 3},
]


def renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def published_weights(model: MaskedAutoencoder) -> dict[str, Tensor]:
    weights = {}
    for ours, tensor in [*model.encoder.state_dict().items(), *model.decoder.state_dict().items()]:
        name = renamed(ours)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third.clone()
        else:
            weights[name] = tensor.clone()
    return weights


def transformers_model(model: MaskedAutoencoder, folder: Path) -> ViTMAEForPreTraining:
    """Loaded from a folder: `transformers` initialises this model wrongly, loads it rightly."""
    blocks, decoder_blocks = model.encoder.blocks, model.decoder.decoder_blocks
    projection = model.encoder.patch_embed.proj
    ViTMAEConfig(
        hidden_size=model.encoder.embed_dim,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        intermediate_size=blocks[0].mlp.fc1.out_features,
        decoder_hidden_size=model.decoder.decoder_embed.out_features,
        decoder_num_hidden_layers=len(decoder_blocks),
        decoder_num_attention_heads=decoder_blocks[0].attn.num_heads,
        decoder_intermediate_size=decoder_blocks[0].mlp.fc1.out_features,
        image_size=model.grid[0] * model.patch_size[0],
        patch_size=model.patch_size[0],
        num_channels=projection.in_channels,
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
        layer_norm_eps=1e-6,
    ).save_pretrained(folder)
    save_file(published_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = ViTMAEForPreTraining.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    return theirs.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the size of the values."""
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loss_predictions_mask_and_gradients_are_those_of_transformers(
    tiny_autoencoder: Build, draw: Draw, tmp_path: Path, case: dict[str, Any], norm_pix_loss: bool
) -> None:
    model = tiny_autoencoder(**case, norm_pix_loss=norm_pix_loss, decoder_depth=2)
    # Biases, norms and a cls position that are not zeros and ones, so that a mixed-up pair shows.
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs = transformers_model(model, tmp_path)
    images, noise = draw(model)

    ours = model(images, noise)
    expected = theirs(images, noise=noise)
    assert torch.equal(ours.hidden, expected.mask.bool())
    assert_close(ours.predicted, expected.logits)
    assert_close(ours.loss, expected.loss)

    ours.loss.backward()
    expected.loss.backward()
    vit, decoder = theirs.vit, theirs.decoder
    assert_close(model.encoder.cls_token.grad, vit.embeddings.cls_token.grad)
    assert_close(model.encoder.patch_embed.proj.weight.grad, vit.embeddings.patch_embeddings.projection.weight.grad)
    assert_close(model.encoder.norm.weight.grad, vit.layernorm.weight.grad)
    assert_close(model.decoder.mask_token.grad, decoder.mask_token.grad)
    assert_close(model.decoder.decoder_pred.weight.grad, decoder.decoder_pred.weight.grad)
