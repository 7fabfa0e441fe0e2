"""ViTMAE of transformers computes our masks, predictions and losses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.models import RECTANGLE, SQUARE, autoencoder, classifier, export
from export.test_transformers import NAMES_OF_BLOCK, encoder_names, loaded
from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.settings import MaskedAutoencoderSettings

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        (SQUARE, 5),
        (replace(SQUARE, norm_pix_loss=False), 1),
        (replace(SQUARE, mask_ratio=0.4, decoder_depth=2), 3),
    ],
)
def test_the_same_noise_gives_the_same_mask_prediction_and_loss(
    tmp_path: Path, settings: MaskedAutoencoderSettings, channels: int
) -> None:
    from transformers import AutoModelForPreTraining

    model = autoencoder(settings, (16, 16), channels)
    exported = export(model, "vit_mae", tmp_path / "out")
    theirs = loaded(AutoModelForPreTraining, tmp_path / "out")
    ours = model.network
    assert isinstance(ours, MaskedAutoencoder)
    images, noise = torch.randn(3, channels, 16, 16), torch.rand(3, 16)
    with torch.no_grad():
        output, expected = theirs(images, noise=noise), ours(images, noise)
        torch.testing.assert_close(output.logits, ours.predict_all(images, noise), rtol=0, atol=1e-5)
    assert torch.equal(output.mask.bool(), ours.mask(noise).hidden())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    assert list(exported.left_behind) == []
    assert theirs.config.norm_pix_loss is settings.norm_pix_loss
    assert theirs.config.mask_ratio == settings.mask_ratio


def test_the_file_has_the_names_that_all_versions_read(tmp_path: Path) -> None:
    export(autoencoder(SQUARE, (8, 8), 3), "vit_mae", tmp_path / "out")
    layers = [f"decoder_layers.0.{name}" for name in NAMES_OF_BLOCK]
    layers += ["decoder_embed", "decoder_norm", "decoder_pred"]
    pairs = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    decoder = {f"decoder.{name}" for name in [*pairs, "mask_token", "decoder_pos_embed"]}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == encoder_names("vit.") | decoder
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_hidden_size"], config["decoder_num_hidden_layers"]) == (12, 1)
    assert (config["decoder_num_attention_heads"], config["decoder_intermediate_size"]) == (3, 48)


@pytest.mark.parametrize(
    ("settings", "image_size", "message"),
    [
        (replace(SQUARE, decoder="cross"), (8, 8), "its decoder is cross, that of ViTMAE is self"),
        (replace(SQUARE, mask="grid"), (16, 16), "its mask is grid, that of ViTMAE is random"),
        (SQUARE, (8, 16), "its images or patches are not square"),
        (SQUARE, (8, 32), "its images or patches are not square"),  # 16 patches, as a square has
        (RECTANGLE, (8, 8), "its images or patches are not square"),
    ],
)
def test_what_is_not_the_published_autoencoder_is_refused(
    tmp_path: Path, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], message: str
) -> None:
    model = autoencoder(settings, image_size, 3)
    with pytest.raises(UserError, match=f"{message}.*; export its encoder to transformers"):
        export(model, "vit_mae", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(model, "transformers", tmp_path / "out")


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no decoder; export the run of its pretraining"):
        export(classifier(), "vit_mae", tmp_path / "out")


def test_automodel_hides_patches_as_the_example_says(tmp_path: Path) -> None:
    from transformers import AutoModel

    from mae.export.transformers_mae import TransformersMae

    model = autoencoder(SQUARE, (16, 16), 3)
    export(model, "vit_mae", tmp_path / "out")
    tokens = AutoModel.from_pretrained(tmp_path / "out")(torch.zeros(1, 3, 16, 16)).last_hidden_state
    assert tokens.shape[1] == 1 + 4  # of 16 patches
    example = TransformersMae().example(model, str(tmp_path / "out"))
    assert "AutoModel hides most patches" in example
    names: dict[str, Any] = {"images": torch.zeros(2, 3, 16, 16)}
    exec(example, names)
    assert names["predicted_pixels"].shape == (2, 16, 48)
