"""Optimisers, their parameter groups, and the learning rate at each step."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim import AdamW, Optimizer

from mae.models.decoders import Decoder
from mae.settings import check
from mae.training.muon import build_muon

_BATCH_OF_BASE_LR = 256


@dataclass(frozen=True)
class OptimSettings:
    """AdamW or Muon with warm-up and cosine decay; the defaults are the paper's pretraining recipe."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: timm's Muon for the matrices of the transformer blocks, and AdamW for everything else. Its steps are scaled
    to the size of AdamW's (arXiv 2502.16982), so all other settings keep their meaning."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images of the global batch; the peak is base_lr * batch_size / 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 40.0
    """Epochs over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay; norms, biases, positions and tokens have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    clip_grad: float | None = None
    """Greatest norm of the gradient; None: no clipping."""

    def __post_init__(self) -> None:
        check(0 < self.base_lr < math.inf, "optim.base_lr", self.base_lr, "above 0")
        check(0 <= self.min_lr < math.inf, "optim.min_lr", self.min_lr, "0 or more")
        check(0 <= self.warmup_epochs < math.inf, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        check(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers from 0, below 1")
        check(self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad", self.clip_grad, "above 0, or None")

    def peak_lr(self, batch_size: int) -> float:
        """Return the peak learning rate by the linear scaling rule (Goyal et al., arXiv 1706.02677), per 256 images."""
        return self.base_lr * batch_size / _BATCH_OF_BASE_LR


@dataclass(frozen=True)
class CosineSchedule:
    """Learning rate at each step: linear from 0 over the warm-up, then half a cosine down to `floor`."""

    peak: float
    floor: float
    warmup_steps: float
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1.0, self.total_steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2


def cosine_schedule(
    optim: OptimSettings, batch_size: int, epochs: float, steps_per_epoch: float, total_steps: int
) -> CosineSchedule:
    """Return the schedule of a run.

    Raises:
        UserError: if the warm-up is not shorter than the run, or the last learning rate is above the peak.
    """
    peak = optim.peak_lr(batch_size)
    shorter = f"less than epochs = {epochs:g}; lower it with epochs"
    check(optim.warmup_epochs < epochs, "optim.warmup_epochs", optim.warmup_epochs, shorter)
    check(optim.min_lr <= peak, "optim.min_lr", optim.min_lr, f"at most the peak learning rate {peak:g}")
    return CosineSchedule(peak, optim.min_lr, optim.warmup_epochs * steps_per_epoch, total_steps)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups, each with `name`, `layer`, `lr_scale` and weight decay.

    With `layer_decay` below 1, later layers of a ViT learn faster (BEiT, arXiv 2106.08254). With L blocks the stem has
    the scale layer_decay**(L+1), block i layer_decay**(L-i), and the final norm, the head and a decoder 1.
    `set_learning_rate` applies `lr_scale`; torch's own schedulers ignore it.
    """
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    last = max((_block(name) for name, _ in named), default=-1) + 2
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        decayed = parameter.ndim > 1 and _may_decay(name, owners[id(parameter)])
        layer = _layer(name, last) if layer_decay < 1 else last
        layer_name = "all" if layer_decay == 1 else _layer_name(layer, last)
        label = layer_name if decayed else f"{layer_name}, no decay"
        group = groups.setdefault(
            label,
            {
                "name": label,
                "layer": layer_name,
                "params": [],
                "lr_scale": layer_decay ** (last - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: Sequence[dict[str, Any]], optim: OptimSettings, device: torch.device) -> Optimizer:
    """Return the optimiser that `optim.name` names; Muon takes groups from `muon.divide_groups`.

    Fused AdamW is several times faster than the loop, on CPU and GPU alike.
    """
    if optim.name == "muon":
        return build_muon(groups, optim.betas)
    return AdamW(list(groups), lr=0.0, betas=optim.betas, fused=device.type in ("cpu", "cuda"))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of each group to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the present learning rate of each layer; empty if all layers have the same."""
    groups = optimizer.param_groups
    if len({group["lr_scale"] for group in groups}) == 1:
        return {}
    return {group["layer"]: group["lr"] for group in groups}


def describe_groups(groups: list[dict[str, Any]], peak: float) -> list[str]:
    """Return a line of at most 80 columns per parameter group: peak learning rate, weight decay, parameters."""
    width = max(len(group["name"]) for group in groups)
    return [
        f"  {group['name']:<{width}}  peak lr {peak * group['lr_scale']:.3e}  "
        f"decay {group['weight_decay']:g}  {sum(p.numel() for p in group['params']):,} parameters"
        for group in groups
    ]


def _may_decay(name: str, owner: nn.Module) -> bool:
    """Return False for the tokens, queries and positions that ViT and decoder hold themselves, not in their layers."""
    if isinstance(owner, Decoder):
        return name.rpartition(".")[2] in owner.decayed
    return not isinstance(owner, VisionTransformer)


def _block(name: str) -> int:
    found = re.match(r"(?:encoder\.)?blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _layer(name: str, last: int) -> int:
    """Return 0 for the stem, i + 1 for block i, `last` for the norm, the head and a decoder."""
    if _block(name) >= 0:
        return _block(name) + 1
    stem = name.removeprefix("encoder.").startswith(("cls_token", "pos_embed", "patch_embed"))
    return 0 if stem else last


def _layer_name(layer: int, last: int) -> str:
    return "stem" if layer == 0 else "norm and head" if layer == last else f"block {layer - 1}"
