"""Facts in the config.json and preprocessor_config.json of a transformers model folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae.errors import UserError
from mae.formats.config_values import mapping, names_by_label, number, numbers, size_pair, whole
from mae.formats.facts import Facts

MODEL_TYPES = ("vit", "vit_mae")
_EPS_OF_TRANSFORMERS = 1e-12
_BICUBIC = 3  # as PIL counts
_BYTE = 1 / 255


def transformers_facts(config: Mapping[str, Any], processor: Mapping[str, Any], path: Path) -> Facts:
    """Return the facts in the content of both files; `processor` is empty where the second is missing.

    Raises:
        UserError: if the model has other parts than our encoder, naming them.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{path} is of model_type {kind}; allowed: {', '.join(MODEL_TYPES)}")
    for name, allowed in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(name, allowed) != allowed:
            raise UserError(f"{path} has {name} {config[name]}; a model that can be read has {allowed}")
    eps = number(config.get("layer_norm_eps", _EPS_OF_TRANSFORMERS))
    if eps is None or eps < 0:
        raise UserError(f"{path} has layer_norm_eps {config['layer_norm_eps']}; allowed: 0 or a small number above it")
    size = size_pair(config.get("image_size"))
    normalises = processor.get("do_normalize", True) is True and processor.get("do_rescale", True) is True
    is_known = "image_mean" in processor and abs((number(processor.get("rescale_factor", _BYTE)) or 0) - _BYTE) < 1e-9
    is_published = kind == "vit_mae"
    return Facts(
        heads=whole(config.get("num_attention_heads")),
        width=whole(config.get("hidden_size")),
        depth=whole(config.get("num_hidden_layers")),
        patch_size=size_pair(config.get("patch_size")),
        channels=whole(config.get("num_channels")),
        image_size=size,
        mean=numbers(processor.get("image_mean")) if normalises and is_known else None,
        std=numbers(processor.get("image_std")) if normalises and is_known else None,
        crop_pct=_crop_pct(processor, size),
        classes=_classes(config.get("id2label")),
        decoder_heads=whole(config.get("decoder_num_attention_heads", 16 if is_published else None)),
        mask_ratio=number(config.get("mask_ratio", 0.75 if is_published else None)),
        norm_pix_loss=config.get("norm_pix_loss") is True if is_published else None,
        eps=eps,
        remarks=tuple(_remarks(processor)),
    )


def _classes(value: object) -> tuple[str, ...] | None:
    names = names_by_label(value)
    numbered = tuple(f"LABEL_{label}" for label in range(len(names or ())))
    return None if names == numbered else names  # transformers' names for classes that have none


def _crop_pct(processor: Mapping[str, Any], size: tuple[int, int] | None) -> float | None:
    """Return the share of the resized image that is cropped; without a crop, 1; without a resize, None."""
    if not processor or size is None or processor.get("do_resize", True) is not True:
        return None
    if processor.get("do_center_crop") is not True:
        return 1.0
    given = processor.get("size")
    sides = mapping(given)
    least = whole(sides.get("shortest_edge", sides.get("height", given)))
    return None if least is None else share_of_resized(min(size), least)


def share_of_resized(side: int, resized: int) -> float:
    """Return the share of a resized side that a crop of `side` takes, so that floor(side / share) is that resized side.

    A crop that is larger than the resized side takes all of it: the share is 1.
    """
    share = min(1.0, side / resized)
    while share < 1 and math.floor(side / share) < resized:  # side / resized may have been rounded up
        share = math.nextafter(share, 0)
    return share


def _remarks(processor: Mapping[str, Any]) -> list[str]:
    if processor.get("do_resize", bool(processor)) is not True:
        return []
    remarks = []
    resizes, sides = processor.get("do_resize", True) is True, processor.get("size")
    if resizes and "shortest_edge" not in mapping(sides):
        remarks.append("its images were squashed to their size, here they are cropped at the centre")
    if processor.get("resample", _BICUBIC) != _BICUBIC:
        remarks.append("its images were not resized bicubic, here they are")
    return remarks
