"""Time of a training step, side by side: this project's model and `transformers.ViTMAEForPreTraining`.

Both get the same sizes, images and number of kept patches; steps are interleaved, so that a drift of the machine
meets both, and medians are printed. `python benchmarks/step.py [--threads N] [--steps N]`
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import AdamW
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.settings import MaskedAutoencoderSettings
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups

# name, image side, channels, batch, settings
CASES = (
    ("Fashion-MNIST, 28 px", 28, 1, 64, MaskedAutoencoderSettings(
        width=128, depth=4, heads=4, patch_size=(4,), decoder_width=64, decoder_depth=1, decoder_heads=2)),
    ("ViT-Ti/8, 64 px", 64, 3, 16, MaskedAutoencoderSettings(
        size="tiny", patch_size=(8,), decoder_width=128, decoder_depth=2, decoder_heads=4)),
    ("ViT-Ti/16, 224 px", 224, 3, 4, MaskedAutoencoderSettings(size="tiny", patch_size=(16,))),
)  # fmt: skip


def our_step(settings: MaskedAutoencoderSettings, side: int, images: torch.Tensor) -> Callable[[], None]:
    model = MaskedAutoencoder(settings, (side, side), images.shape[1])
    optimizer = build_optimizer(parameter_groups(model, 0.05), OptimSettings(), torch.device("cpu"))

    def step() -> None:
        model(images, torch.rand(len(images), model.patches)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(settings: MaskedAutoencoderSettings, side: int, images: torch.Tensor) -> Callable[[], None]:
    width, depth, heads = settings.shape
    config = ViTMAEConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=side, patch_size=settings.patch[0], num_channels=images.shape[1],
        decoder_hidden_size=settings.decoder_width, decoder_num_hidden_layers=settings.decoder_depth,
        decoder_num_attention_heads=settings.decoder_heads, decoder_intermediate_size=4 * settings.decoder_width,
        mask_ratio=settings.mask_ratio, norm_pix_loss=settings.norm_pix_loss,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def step() -> None:
        model(images).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.steps} interleaved steps")
    print(f"{'model':<22}{'batch':>6}{'ours ms':>10}{'transformers ms':>17}{'ratio':>7}")
    for name, side, channels, batch, settings in CASES:
        images = torch.randn(batch, channels, side, side)
        steps = our_step(settings, side, images), transformers_step(settings, side, images)
        times: tuple[list[float], list[float]] = ([], [])
        for step in steps:
            step()
        for _ in range(options.steps):
            for step, seconds in zip(steps, times, strict=True):
                began = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - began)
        ours, theirs = (1000 * statistics.median(seconds) for seconds in times)
        print(f"{name:<22}{batch:>6}{ours:>10.1f}{theirs:>17.1f}{theirs / ours:>7.2f}")


if __name__ == "__main__":
    main()
