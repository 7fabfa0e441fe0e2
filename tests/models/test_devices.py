"""Forward passes and losses on a GPU under autocast, without one: torch's fake tensors know devices and dtypes.

A tensor that stays on the CPU, or a loss of another dtype than float32, fails here. Fake tensors hold no numbers, and
the backward pass needs a GPU, so neither is tested.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from conftest import in_fork
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from mae.data.loader import normalize
from mae.data.statistics import PixelStatistics
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import HeadKind, build_classifier
from mae.models.decoders import DECODERS
from mae.models.execution import Checkpointing, checkpoint_activations
from mae.models.masking import MaskKind
from mae.models.settings import EncoderSettings

BATCH, CLASSES = 4, 5
STATISTICS = PixelStatistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Make all new tensors fake, and switch on autocast to bfloat16 for the GPU."""
    was_enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # Where there is no GPU, autocast's context manager warns, and stays in float32.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_autocast_enabled("cuda", was_enabled)
        torch.set_autocast_dtype("cuda", dtype)
        torch.clear_autocast_cache()


def to_gpu(model: nn.Module) -> None:
    """Replace all parameters and buffers by empty ones on the GPU; `Module.to` refuses fake tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            on_gpu = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(module, name, nn.Parameter(on_gpu, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))


def normalized_batch() -> Tensor:
    images = torch.empty(BATCH, 3, 16, 16, dtype=torch.uint8, device="cuda")
    return normalize(images, STATISTICS)


def require_gpu(dtype: torch.dtype, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)


@pytest.mark.parametrize("checkpointing", ["none", "gelu", "blocks"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask", get_args(MaskKind))
@pytest.mark.parametrize("decoder", DECODERS)
@in_fork
def test_an_autoencoder_computes_on_the_gpu_and_its_loss_in_float32(
    tiny_autoencoder: Callable[..., MaskedAutoencoder],
    decoder: str,
    mask: str,
    norm_pix_loss: bool,
    checkpointing: Checkpointing,
) -> None:
    model = tiny_autoencoder(decoder=decoder, decoder_depth=2, mask=mask, norm_pix_loss=norm_pix_loss)
    checkpoint_activations(model, checkpointing)
    with fake_gpu():
        to_gpu(model)
        images, noise = normalized_batch(), torch.empty(BATCH, model.patches, device="cuda")
        loss, predicted, ids = model(images, noise)
        pictures = model.to_images(model.predict_all(images, noise), images)
    require_gpu(torch.float32, images, loss, pictures)
    require_gpu(torch.bfloat16, predicted)
    require_gpu(torch.int64, ids)
    assert loss.requires_grad


@pytest.mark.parametrize("checkpointing", ["none", "gelu", "blocks"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
@in_fork
def test_a_classifier_computes_on_the_gpu_and_its_loss_in_float32(head: HeadKind, checkpointing: Checkpointing) -> None:
    settings = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
    model = build_classifier(settings, (16, 16), 3, CLASSES, head, drop_path=0.3)
    checkpoint_activations(model, checkpointing)
    with fake_gpu():
        to_gpu(model)
        logits = model(normalized_batch())
        labels = torch.empty(BATCH, dtype=torch.int64, device="cuda")
        loss = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    require_gpu(torch.bfloat16, logits)
    require_gpu(torch.float32, loss)
    assert loss.requires_grad
