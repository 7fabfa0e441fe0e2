"""Folders of runs with small random models; nothing is trained."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from mae.explore.models import RunModels
from mae.explore.stops import stops_of
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.description import describe_model
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.weights import file_tensors, write_weights

SIZE = (8, 12)
GRID = (2, 3)
NAMES = ("ant", "<b>bee</b>", "${1+1} {{value}}", "dog")
SETTINGS = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=8, decoder_depth=1, decoder_heads=2, mask_ratio=0.5
)
ENCODER = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))


def autoencoder(seed: int, size: tuple[int, int] = SIZE) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = MaskedAutoencoder(SETTINGS, size, 3)
    nn.init.normal_(model.encoder.blocks[-1].attn.qkv.weight)  # so that attention is not even
    return model


def write_autoencoder(folder: Path, model: MaskedAutoencoder, size: tuple[int, int] = SIZE) -> Path:
    """Write a model file into a folder of a run or of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    described = describe_model("masked autoencoder", SETTINGS, size, (0.5,) * 3, (0.25,) * 3, 1.0)
    write_weights(folder / "model.safetensors", file_tensors(model), described.metadata())
    return folder


def write_run(path: Path, steps: tuple[int, ...] = (10, 20)) -> Path:
    """A finished pretraining with these checkpoints."""
    for step in steps:
        write_autoencoder(path / "checkpoints" / f"step-{step:09d}", autoencoder(step))
    return write_autoencoder(path, autoencoder(0))


def write_classifier(path: Path) -> Path:
    """A finished fine-tuning."""
    path.mkdir()
    torch.manual_seed(1)
    model = build_classifier(ENCODER, SIZE, 3, len(NAMES), "linear")
    nn.init.normal_(model.head.weight)
    described = describe_model("classifier", ENCODER, SIZE, (0.5,) * 3, (0.25,) * 3, 1.0, NAMES)
    write_weights(path / "model.safetensors", file_tensors(model), described.metadata())
    return path


def models_of(run: Path) -> RunModels:
    return RunModels(stops_of(run))


def image_file(pixels: NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def pictures_in(text: str) -> list[NDArray[np.uint8]]:
    """The pictures that HTML embeds."""
    data = re.findall(r'src="data:image/\w+;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in data]
