"""Counts are those of torch's own counter, operation for operation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.flops import Flops, autoencoder_flops, classifier_flops, peak_flops
from mae.models.freezing import freeze, frozen_blocks
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings

BATCH = 2


def counted(run: Callable[[], Tensor]) -> Flops:
    """What torch counts of a loss and its gradients, per image.

    Attention is taken apart into its products, some of which a fused backward computes a second time.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = run()
        forward = counter.get_total_flops()
        loss.backward()
    return Flops(forward // BATCH, counter.get_total_flops() // BATCH)


@pytest.mark.parametrize(
    "replaced",
    [
        {},
        {"decoder_depth": 1},
        {"decoder_depth": 3, "predict_ratio": 0.4},
        {"decoder": "cross", "decoder_depth": 2},
        {"decoder": "cross", "depth": 3, "predict_ratio": 0.25},
        {"mask": "grid", "norm_pix_loss": False},
        {"mask_ratio": 0.5, "mask": "block", "patch_size": (2, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize(("image_size", "channels"), [((16, 16), 3), ((8, 24), 1)])
def test_flops_of_an_autoencoder_are_those_that_torch_counts(
    tiny_settings: Callable[..., MaskedAutoencoderSettings],
    draw: Callable[..., tuple[Tensor, Tensor]],
    replaced: dict[str, Any],
    image_size: tuple[int, int],
    channels: int,
) -> None:
    settings = tiny_settings(**replaced)
    model = MaskedAutoencoder(settings, image_size, channels)
    images, noise = draw(model, BATCH)
    assert autoencoder_flops(settings, image_size, channels) == counted(lambda: model(images, noise).loss)


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("depth", [1, 3])
def test_flops_of_a_classifier_are_those_that_torch_counts(head: Any, depth: int) -> None:
    settings = EncoderSettings(width=16, depth=depth, heads=2, patch_size=(4, 2))
    model: nn.Module = build_classifier(settings, (16, 8), 5, 7, head)
    images = torch.randn(BATCH, 5, 16, 8)
    assert classifier_flops(settings, (16, 8), 5, 7, head) == counted(lambda: model(images).square().mean())


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
@pytest.mark.parametrize("frozen", ["none", "encoder", "blocks:0", "blocks:2", "blocks:3"])
def test_flops_of_other_pools_and_of_frozen_blocks_are_those_that_torch_counts(
    head: Any, pool: Any, frozen: str
) -> None:
    settings = EncoderSettings(width=16, depth=3, heads=2, patch_size=(4, 2))
    model = build_classifier(settings, (16, 8), 5, 7, head, pool=pool)
    blocks = frozen_blocks(frozen, 3)
    freeze(model, blocks)
    images = torch.randn(BATCH, 5, 16, 8)
    expected = counted(lambda: model(images).square().mean())
    assert classifier_flops(settings, (16, 8), 5, 7, head, pool, blocks) == expected


def test_the_published_model_is_twenty_billion_operations_forward() -> None:
    """ViT-B/16: encoder 8.6, decoder 10.5 without the last block's visible tokens."""
    flops = autoencoder_flops(MaskedAutoencoderSettings(), (224, 224), 3)
    assert flops.forward == pytest.approx(19.3e9, rel=0.02)
    assert flops.training == pytest.approx(3 * flops.forward, rel=0.01)


def test_peaks_are_of_whole_gpus_that_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H200 NVL", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
