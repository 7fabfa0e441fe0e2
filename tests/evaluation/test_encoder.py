"""A trained encoder comes from any file of a run, with what its images must be."""

from pathlib import Path

import pytest
import torch

from mae.errors import UserError
from mae.evaluation.encoder import trained_encoder
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.description import describe_model
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.weights import file_tensors, write_weights

SETTINGS = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=8, decoder_depth=1, decoder_heads=2
)


def test_a_run_gives_its_encoder_and_the_description_of_its_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(SETTINGS, (8, 12), 1).eval()
    description = describe_model("masked autoencoder", SETTINGS, (8, 12), (0.4,), (0.3,), 0.9)
    write_weights(tmp_path / "model.safetensors", file_tensors(model), description.metadata())
    images = torch.randn(2, 1, 8, 12)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        encoder, found = trained_encoder(source)
        assert found == description
        assert not encoder.training
        with torch.no_grad():
            features = encoder(images)
            assert features.shape == (2, 16)
            assert torch.equal(features, model.encoder(images))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        trained_encoder(tmp_path)
