"""Small models with random weights, in files."""

from pathlib import Path

import pytest
import torch

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.description import describe_model
from mae.models.selection import Selection
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.weights import file_tensors, write_weights

SIZE = (8, 12)
NAMES = ("ant", "bee", "cat")
AUTOENCODER = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=8, decoder_depth=1, decoder_heads=2
)
ENCODER = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """The folder of a pretraining run."""
    (tmp_path / "pre").mkdir()
    torch.manual_seed(0)
    model = MaskedAutoencoder(AUTOENCODER, SIZE, 3)
    description = describe_model("masked autoencoder", AUTOENCODER, SIZE, (0.4,) * 3, (0.3,) * 3, 0.9)
    write_weights(tmp_path / "pre" / "model.safetensors", file_tensors(model), description.metadata())
    return tmp_path / "pre"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The folder of a fine-tuning run, whose best model is not its last."""
    (tmp_path / "tuned").mkdir()
    for name, seed, metadata in (("model", 1, {}), ("best", 2, Selection("abc", 7, 0.5).metadata())):
        torch.manual_seed(seed)
        model = build_classifier(ENCODER, SIZE, 3, len(NAMES), "mlp")
        torch.nn.init.normal_(model.head.fc2.weight)
        description = describe_model("classifier", ENCODER, SIZE, (0.4,) * 3, (0.3,) * 3, 0.9, NAMES)
        weights = file_tensors(model)
        write_weights(tmp_path / "tuned" / f"{name}.safetensors", weights, description.metadata() | metadata)
    return tmp_path / "tuned"
