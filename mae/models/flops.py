"""Number of operations that a model takes, and number that a GPU can do per second.

Only matrix products are counted, with two operations per multiply-add, as these models compute them: the encoder sees
kept patches only, the end of the decoder predicted patches only. Norms, activations and softmax are left out, as usual.
"""

from typing import NamedTuple

import torch

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.blocks import block_flops, linear_flops
from mae.models.classifier import HeadKind, features_of
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.vit import TokenKind

# Dense bf16 with sums in fp32, from NVIDIA's data sheets, by the name that the driver reports. Names are complete: the
# same chip is slower on other boards (H100 NVL), and so is a part of it (MIG).
_PEAK_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


class Flops(NamedTuple):
    """Floating-point operations for one image."""

    forward: int
    training: int
    """Forward and backward, each product once: checkpointing and fused attention compute some again, uncounted."""


def autoencoder_flops(settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int) -> Flops:
    """Count the operations of a masked autoencoder and its loss."""
    with torch.device("meta"):
        model = MaskedAutoencoder(settings, image_size, channels)
    (width, depth, _), visible = settings.shape, model.kept + 1  # with the cls token
    embedding = linear_flops(model.kept, _patch_pixels(settings, channels), width)
    encoder = embedding + depth * block_flops(visible, visible, width, width)
    return _with_backward(encoder + model.decoder.flops(visible, model.predicted), embedding)


def classifier_flops(
    settings: EncoderSettings,
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    head: HeadKind,
    pool: TokenKind = "cls",
    frozen: int | None = None,
) -> Flops:
    """Count the operations of a classifier, which sees every patch.

    Nothing is computed backwards for the first blocks, if `frozen` of them are not trained (see `frozen_blocks`).
    """
    rows, columns = settings.grid(image_size)
    width, depth, _ = settings.shape
    tokens, features = rows * columns + 1, features_of(pool, width)
    embedding = linear_flops(rows * columns, _patch_pixels(settings, channels), width)
    block = block_flops(tokens, tokens, width, width)
    first = linear_flops(1, features, width if head == "mlp" else classes)
    forward = embedding + depth * block + first + (linear_flops(1, width, classes) if head == "mlp" else 0)
    if frozen is None:
        return _with_backward(forward, embedding)
    unchanged = embedding + min(frozen, depth) * block
    # The features of a frozen encoder need no gradient, except those that a new norm makes.
    ends_at_head = frozen > depth and pool != "avg"
    return Flops(forward, forward + 2 * (forward - unchanged) - (first if ends_at_head else 0))


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 operations per second that the data sheet of this GPU states; None for unknown devices."""
    return _PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _patch_pixels(settings: EncoderSettings, channels: int) -> int:
    return settings.patch[0] * settings.patch[1] * channels


def _with_backward(forward: int, embedding: int) -> Flops:
    """Add the backward pass: one product for each factor of a product, except the pixels in the `embedding`."""
    return Flops(forward, 3 * forward - embedding)
