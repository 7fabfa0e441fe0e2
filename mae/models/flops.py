"""How much arithmetic a model is, and how much of it the maker of a GPU promises.

Counted are the matrix products, two operations per multiply-add, as these models compute them: kept patches only in the
encoder, predicted patches only at the end of the decoder. Norms, activations and softmax are left out, as everywhere.
"""

from typing import NamedTuple

import torch

from mae.models.classifier import HeadKind
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings

_MLP_RATIO = 4

# Dense bf16 with sums in fp32, from NVIDIA's data sheets, by the name that the driver tells. Names are not shortened:
# the same chip is slower on other boards (H100 NVL), and in part (MIG).
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
    """Forward and backward, each product once: what checkpointing or fused attention compute again is not counted."""


def autoencoder_flops(settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int) -> Flops:
    """Of a masked autoencoder, its loss included."""
    grid = settings.grid(image_size)
    kept, predicted, patches = settings.kept(grid), settings.predicted(grid), grid[0] * grid[1]
    encoder, decoder, patch_pixels = settings.shape, settings.decoder_shape, _patch_pixels(settings, channels)
    visible, everything = kept + 1, patches + 1  # with the cls token
    embedding = _linear(kept, patch_pixels, encoder.width)
    forward = embedding + encoder.depth * _block(visible, visible, encoder.width, encoder.width)
    if settings.decoder == "cross":
        forward += _linear(visible * encoder.width, encoder.depth + 1, decoder.depth)  # the mixes of layers
        forward += decoder.depth * _block(predicted, visible, decoder.width, encoder.width)
    else:
        forward += _linear(visible, encoder.width, decoder.width)
        forward += (decoder.depth - 1) * _block(everything, everything, decoder.width, decoder.width)
        forward += _block(predicted, everything, decoder.width, decoder.width)
    forward += _linear(predicted, decoder.width, patch_pixels)
    return _with_backward(forward, embedding)


def classifier_flops(
    settings: EncoderSettings, image_size: tuple[int, int], channels: int, classes: int, head: HeadKind
) -> Flops:
    """Of a classifier, which sees every patch."""
    rows, columns = settings.grid(image_size)
    width, depth, _ = settings.shape
    tokens = rows * columns + 1
    embedding = _linear(rows * columns, _patch_pixels(settings, channels), width)
    forward = embedding + depth * _block(tokens, tokens, width, width) + _linear(1, width, classes)
    if head == "mlp":
        forward += _linear(1, width, width)
    return _with_backward(forward, embedding)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second that the maker states for this GPU; None for all that are not known here."""
    return _PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _patch_pixels(settings: EncoderSettings, channels: int) -> int:
    return settings.patch[0] * settings.patch[1] * channels


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _block(tokens: int, memory: int, width: int, memory_width: int) -> int:
    """Attention of `tokens` to a `memory` of tokens of `memory_width`, and an MLP."""
    queries_and_outputs = 2 * _linear(tokens, width, width)
    keys_and_values = _linear(memory, memory_width, 2 * width)
    scores_and_sums = 2 * _linear(tokens, width, memory)
    mlp = 2 * _linear(tokens, width, _MLP_RATIO * width)
    return queries_and_outputs + keys_and_values + scores_and_sums + mlp


def _with_backward(forward: int, embedding: int) -> Flops:
    """Backward is a product for each factor of a product; but the pixels of the `embedding` need no gradient."""
    return Flops(forward, 3 * forward - embedding)
