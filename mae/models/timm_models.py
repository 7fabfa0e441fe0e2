"""Shapes of timm's ViTs by name. A name means a shape only: no weights are loaded."""

import difflib
from functools import cache
from itertools import islice
from typing import Any

import timm
import torch
from timm.models import list_models
from torch import nn

from mae.errors import UserError, first_of
from mae.models.sizes import SIZES, Size
from mae.models.vit import TokenKind, build_vit

# timm's modules that define plain ViTs, among other models.
_MODULES = ("vision_transformer", "deit")
_CANDIDATES, _SIMILAR, _MOST_OFFERED = 6, 0.4, 3


@cache
def timm_shape(name: str) -> tuple[Size, tuple[int, int]]:
    """Return shape and patch size of timm's model `name`, which must have the same parts as our encoder.

    Raises:
        UserError: if there is no such model, naming models with similar names, or if it is another kind of model,
            naming the parts that differ.
    """
    known = [model for module in _MODULES for model in list_models(module=module)]
    if name not in known:
        raise UserError(
            f"model.size is {name}; allowed: {', '.join(SIZES)}, or a plain ViT of timm such as vit_base_patch8_224"
            + _did_you_mean(name, known)
        )
    size, patch, differences = _compare(name)
    if differences:
        raise UserError(
            f"model.size is {name}, which is not a plain ViT: {first_of(differences, most=2)}; "
            "choose another, or set model.width, depth, heads and patch_size"
        )
    return size, patch


def _did_you_mean(name: str, known: list[str]) -> str:
    without_tag = name.partition(".")[0]
    if without_tag in known:
        return f"; did you mean {without_tag}? A name means a shape, no weights are loaded"
    close = difflib.get_close_matches(name, [*SIZES, *known], n=_CANDIDATES, cutoff=_SIMILAR)
    valid = list(islice((other for other in close if other in SIZES or not _compare(other)[2]), _MOST_OFFERED))
    return f"; did you mean {' or '.join(valid)}?" if valid else ""


@cache
def _compare(name: str) -> tuple[Size, tuple[int, int], list[str]]:
    """Return shape and patch size of a model, and how it differs from our encoder of this shape."""
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        heads = getattr(getattr(theirs.blocks[0], "attn", None), "num_heads", 1)
        size, patch = Size(theirs.embed_dim, len(theirs.blocks), heads), theirs.patch_embed.patch_size
        return size, patch, differences(theirs, size)


def differences(theirs: nn.Module, size: Size, pool: TokenKind = "cls") -> list[str]:
    """Return how a ViT of timm differs from our encoder of this shape that pools by `pool`."""
    embedding: Any = theirs.patch_embed
    with torch.device("meta"):
        ours = build_vit(size, embedding.patch_size, embedding.img_size, embedding.proj.in_channels, pool=pool)
    found, wanted = _parts(theirs), _parts(ours)
    return [
        f"its {part} is {found[part]} instead of {wanted[part]}"
        if part in found and part in wanted
        else f"it has {'' if part in found else 'no '}{part}"
        for part in dict.fromkeys([*found, *wanted])
        if found.get(part) != wanted.get(part)
    ]


def _parts(model: nn.Module) -> dict[str, str]:
    """Return all that tells models apart: class, pooling, parameters and modules."""
    parameters = {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()}
    modules = {
        name: type(module).__name__ if any(module.children()) else repr(module)
        for name, module in model.named_modules()
        if name
    }
    return {"class": type(model).__name__, "pooling": str(model.global_pool)} | parameters | modules
