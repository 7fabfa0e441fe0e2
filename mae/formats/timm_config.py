"""Facts in the config.json of a timm model folder, and the models of timm whose parts are those of our encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import list_models
from torch import nn

from mae.data.images.levels import check_value_range
from mae.errors import UserError, first_of
from mae.formats.config_values import mapping, names_by_label, number, numbers, size_pair
from mae.formats.facts import Facts
from mae.models.sizes import Size
from mae.models.timm_models import differences
from mae.settings import check

# timm's modules that define plain ViTs, among other models.
_MODULES = ("vision_transformer", "deit")
# Arguments of timm's ViT that decide its parts, and those that change nothing in a trained model.
_BUILDING = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm",
    "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "global_pool",
}  # fmt: skip
_DEEPEST = 1000
_HARMLESS = {
    "num_classes", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_rate",
    "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
}  # fmt: skip


def timm_facts(config: Mapping[str, Any], path: Path) -> Facts:
    """Return the facts in the content of a timm config.json.

    Raises:
        UserError: if the model is none of timm, or has other parts than our encoder, naming them.
    """
    model, given = _built(config, path), mapping(config.get("pretrained_cfg")) or config
    pool = str(model.global_pool)
    norms_the_mean = isinstance(model.fc_norm, nn.LayerNorm)
    classes = config.get("label_names", given.get("label_names", given.get("labels")))
    sizes = given.get("input_size")
    listed = size_pair(sizes[1:]) if isinstance(sizes, list) and len(sizes) == 3 else None
    built, patch = (tuple(size) for size in (model.patch_embed.img_size, model.patch_embed.patch_size))
    return Facts(
        heads=model.blocks[0].attn.num_heads,
        width=model.embed_dim,
        depth=len(model.blocks),
        patch_size=patch,
        channels=model.patch_embed.proj.in_channels,
        image_size=built if "img_size" in mapping(config.get("model_args")) else listed or built,
        mean=numbers(given.get("mean")),
        std=numbers(given.get("std")),
        crop_pct=number(given.get("crop_pct")),
        value_range=_value_range(config.get("value_range"), model.patch_embed.proj.in_channels, path),
        classes=names_by_label(classes),
        head_reads="avg" if pool == "avg" and not norms_the_mean else "cls",
        remarks=tuple(_remarks(given)),
    )


def _built(config: Mapping[str, Any], path: Path) -> Any:
    """Build the model without memory for its weights, and compare its parts with ours."""
    name = str(config.get("architecture")).partition(".")[0]
    if name not in [known for module in _MODULES for known in list_models(module=module)]:
        raise UserError(f"{path} is of {name}, which is not a ViT of timm {timm.__version__}; a plain ViT can be read")
    arguments = mapping(config.get("model_args"))
    unknown = [f"{key} {value}" for key, value in arguments.items() if key not in _BUILDING | _HARMLESS]
    if unknown:
        raise UserError(f"{path} has model_args that a plain ViT has not: {first_of(unknown)}")
    depth = arguments.get("depth", 1)
    if not (type(depth) is int and 1 <= depth <= _DEEPEST):
        raise UserError(f"{path} has depth {depth}; allowed: 1 to {_DEEPEST}")
    try:
        with torch.device("meta"):
            model = timm.create_model(
                name, num_classes=0, **{key: arguments[key] for key in sorted(_BUILDING & arguments.keys())}
            )
            size = Size(model.embed_dim, len(model.blocks), getattr(model.blocks[0].attn, "num_heads", 1))
            found = differences(model, size, pool="avg" if isinstance(model.fc_norm, nn.LayerNorm) else "cls")
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        raise UserError(f"{path} describes no ViT that timm can build: {error}") from None
    found = [each for each in found if not each.startswith("its pooling")]
    if found:
        raise UserError(f"{path} is of {name}, which is not a plain ViT: {first_of(found, most=2)}")
    return model


def _value_range(value: Any, channels: int, path: Path) -> tuple[float, ...] | None:
    """Return the range of values that an export of ours names, without which images would be read in another way."""
    if value is None:
        return None
    name = f"{path}: value_range"
    check(isinstance(value, list) and {*map(type, value)} <= {int, float}, name, value, "a list of numbers")
    found = tuple(map(float, value))
    check_value_range(name, found, channels)
    return found


def _remarks(given: Mapping[str, Any]) -> list[str]:
    remarks = []
    mode, resampling = given.get("crop_mode") or "center", given.get("interpolation") or "bicubic"
    if mode != "center":
        remarks.append(f"its images were prepared by crop_mode {mode}, here by a central crop")
    if resampling != "bicubic":
        remarks.append(f"its images were resized {resampling}, here bicubic")
    return remarks
