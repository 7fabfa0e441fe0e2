"""One training step of one model, ready to be timed: ours, the plain implementation, or the one of `transformers`.

A step is forward, backward, AdamW and zeroing of the gradients. Weights, images and noise are the same for each row.
*Plain* computes everything as the paper's first code does, with torch's own AdamW, and reads the loss in each step
(`models.py`). `transformers` also uses torch's own AdamW. Ours trains like `mae pretrain`: fused AdamW, no wait for the
loss.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from models import PlainMaskedAutoencoder, transformers_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.execution import Checkpointing, checkpoint_activations, compile_blocks
from mae.models.flops import autoencoder_flops
from mae.models.patches import patchify, take
from mae.models.settings import MaskedAutoencoderSettings
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups

CHANNELS = 3
LR, WEIGHT_DECAY = 1e-4, 0.05


@dataclass(frozen=True)
class Case:
    """A model, and how many images a step takes."""

    name: str
    size: Literal["tiny", "small", "base", "large", "huge"]
    batch: int
    memory_batch: int = 0
    """Number of images when memory is measured in a separate process."""
    side: int = 224
    patch: int = 16
    decoder: tuple[int | None, int | None, int | None] = (512, 8, 16)
    """Width, blocks and heads; by default the paper's, which are meant for larger encoders than Ti and S."""

    def settings(self) -> MaskedAutoencoderSettings:
        width, depth, heads = self.decoder
        return MaskedAutoencoderSettings(
            size=self.size, patch_size=(self.patch,), decoder_width=width, decoder_depth=depth, decoder_heads=heads
        )


@dataclass(frozen=True)
class Row:
    """A model and the way it is trained."""

    model: Literal["ours", "plain", "transformers"] = "ours"
    attention: Literal["manual", "eager", "sdpa"] = "sdpa"
    plain_update: bool = False
    """Use torch's own AdamW, and wait for the loss in each step."""
    all_patches: bool = False
    """Predict the visible patches too."""
    checkpointing: Checkpointing = "none"
    compiled: Literal["nothing", "blocks", "blocks and loss", "model"] = "nothing"
    """What torch compiles: each block by itself, as `mae pretrain --compile True` does; the loss too, in one kernel;
    or the whole model as one graph."""
    mode: str | None = None
    """torch.compile's mode for the whole model: reduce-overhead for CUDA graphs, max-autotune for searched kernels."""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Model settings with which the loss differs from plain's."""


QUARTER: dict[str, Any] = {"predict_ratio": 0.25}
CROSS: dict[str, Any] = {**QUARTER, "decoder": "cross", "decoder_depth": None}
PRESET: dict[str, Any] = {"decoder_width": None, "decoder_depth": None, "decoder_heads": None}

Step = Callable[..., Tensor]
"""Function: number of images (default: all) -> loss."""


class Times(NamedTuple):
    """Seconds of a step."""

    wall: float
    cpu: float
    """CPU seconds of all threads of this process."""


def settings_of(case: Case, row: Row) -> MaskedAutoencoderSettings:
    return replace(case.settings(), **row.changed)


def flops_of(case: Case, row: Row) -> int:
    """Return the FLOPs of a training step on one image, for our model with the settings of this row."""
    return autoencoder_flops(settings_of(case, row), (case.side, case.side), CHANNELS).training


def build_step(case: Case, row: Row, batch: int, device: torch.device, backend: str = "inductor") -> Step:
    """Return the training step of a row, in bf16 on a GPU; `backend` is torch.compile's, if the row compiles."""
    torch.manual_seed(0)
    with device:
        ours = MaskedAutoencoder(settings_of(case, row), (case.side, case.side), CHANNELS)
    generator = torch.Generator(device).manual_seed(1)
    images = torch.randn(batch, CHANNELS, case.side, case.side, generator=generator, device=device)
    noise = torch.rand(batch, ours.patches, generator=generator, device=device)
    model, loss_of = model_and_loss(ours, row, device, backend)
    model.to(device).train()
    optimizer = build_adamw(model, row, device)

    def step(taken: int = batch) -> Tensor:
        if row.compiled == "model":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(images[:taken], noise[:taken])
        if row.plain_update:
            loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if row.plain_update:
            synchronize(device)
        return loss.detach()

    return step


def model_and_loss(
    ours: MaskedAutoencoder, row: Row, device: torch.device, backend: str
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return the model of a row, with the weights of `ours`, and a function (images, noise) -> loss."""
    if row.model == "plain":
        assert row.attention != "eager"
        with device:
            plain = PlainMaskedAutoencoder(ours, row.attention)
        return plain, lambda images, noise: plain(images, noise).loss
    if row.model == "transformers":
        assert row.attention != "manual"
        theirs = transformers_model(ours, row.attention)
        return theirs, lambda images, noise: theirs(images, noise=noise).loss
    checkpoint_activations(ours, row.checkpointing)
    if row.compiled in ("blocks", "blocks and loss"):
        compile_blocks(ours, backend)
    if row.compiled == "blocks and loss":
        ours.loss = torch.compile(ours.loss, backend=backend)  # type: ignore[method-assign]
    if row.all_patches:
        return ours, lambda images, noise: loss_after_all(ours, images, noise)

    def loss_of(images: Tensor, noise: Tensor) -> Tensor:
        return ours(images, noise).loss

    if row.compiled == "model":
        mode = row.mode if backend == "inductor" else None
        return ours, torch.compile(loss_of, backend=backend, mode=mode, dynamic=False)
    return ours, loss_of


def loss_after_all(model: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Return the usual loss, but predict all patches for it."""
    ids = model.mask(noise).ids_hidden
    return model.loss(take(patchify(images, model.patch_size), ids), take(model.predict_all(images, noise), ids))


def build_adamw(model: nn.Module, row: Row, device: torch.device) -> Optimizer:
    if row.model == "transformers":
        return AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    groups = parameter_groups(model, WEIGHT_DECAY)
    if row.plain_update:
        return AdamW(groups, lr=LR, betas=OptimSettings().betas)
    optimizer = build_optimizer(groups, OptimSettings(), device)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, count: int, device: torch.device) -> Times:
    """Return the times of one step, averaged over `count` steps with one wait at their end."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    synchronize(device)
    return Times((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)


def memory_from_here(device: torch.device) -> int:
    """Reset the peak, and return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def memory_at_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def resident(what: str) -> int:
    """Return one of the kernel's counts of bytes for this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{what}:")
