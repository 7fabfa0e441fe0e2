"""Description of a model of another library, from the shapes of its tensors and from what is said beside them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mae.errors import UserError, first_of
from mae.formats.facts import Facts
from mae.formats.recognition import Recognised
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.description import DecoderDescription, ModelDescription
from mae.models.encoder import build_encoder
from mae.models.network import head_of
from mae.models.weights import encoder_part, file_tensors, has_decoder, norms_the_mean

# Heads of the published encoders by their width, and channels of each head of the published decoders of these widths.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_WIDTHS, _DECODER_HEAD_CHANNELS = (192, 256, 512), 32
_MOCO_AMBIGUOUS = 384
_CROP_PCT = 0.875
_MASK_RATIO = 0.75  # of all published models
_HEAD = ("head.weight", "head.bias")


class Described(NamedTuple):
    """Model and what is known of it."""

    found: Recognised
    description: ModelDescription
    """Description; without mean and std (both empty) if nothing says them."""
    remarks: tuple[str, ...]
    """What was assumed, or is different here."""


def describe(found: Recognised, facts: Facts, heads: int | None, source: str) -> Described:
    """Describe a model, and leave out a head or a decoder that does not fit.

    Raises:
        UserError: if tensors of the encoder are missing or have other shapes than those of a plain ViT or than the
            config says, or the number of heads or the size of the images is not known.
    """
    weights, remarks = found.weights, list(facts.remarks)
    _, channels, *patch = _shape(weights, "patch_embed.proj.weight", 4, source)
    tokens, width = _shape(weights, "pos_embed", 3, source)[1:]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    _require_stated(facts, source, width=width, depth=depth, channels=channels, patch_size=(patch[0], patch[1]))
    crop_pct = facts.crop_pct if facts.crop_pct is not None and 0 < facts.crop_pct <= 1 else None
    if crop_pct is None:
        crop_pct = _CROP_PCT
        remarks.append(f"nothing says how its images were cropped: crop_pct {_CROP_PCT} is taken")
    has_normalisation = facts.mean is not None and facts.std is not None and len(facts.mean) == len(facts.std)
    is_usable = has_normalisation and len(facts.mean or ()) == channels and min(facts.std or (0,)) > 0
    description = ModelDescription(
        kind="masked autoencoder",
        width=width,
        depth=depth,
        heads=_heads(width, facts, found, heads, source),
        patch_size=(patch[0], patch[1]),
        image_size=_image_size(tokens, (patch[0], patch[1]), facts, source),
        channels=channels,
        mean=facts.mean or () if is_usable else (),
        std=facts.std or () if is_usable else (),
        crop_pct=crop_pct,
        value_range=facts.value_range,
        pool="avg" if norms_the_mean(weights) else "cls",
    )
    _require_encoder(weights, description, source)
    found, decoder = _with_decoder(found, facts, description, remarks)
    found, description = _with_head(found, facts, replace(description, decoder=decoder))
    return Described(found, description, tuple(remarks))


def _require_stated(facts: Facts, source: str, **shape: object) -> None:
    """Refuse a config of another model, whose heads and classes would be taken in silence."""
    for name, found in shape.items():
        stated = getattr(facts, name)
        if stated is not None and stated != found:
            raise UserError(
                f"the config of {source} says {name} {stated}, but its tensors have {found}: they are of two models; "
                "put the config that belongs to the weights beside them"
            )


def _shape(weights: Mapping[str, Tensor], name: str, axes: int, source: str) -> list[int]:
    shape = list(weights[name].shape)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{source} is not a plain ViT: {name} is {shape}, with {axes} axes expected")
    return shape


def _heads(width: int, facts: Facts, found: Recognised, given: int | None, source: str) -> int:
    """Return the number of heads, which no tensor shows: as the config says, as is given, or as is usual."""
    is_usual = not (found.is_moco and width == _MOCO_AMBIGUOUS)
    heads = facts.heads or given or (_HEADS.get(width) if is_usual else None)
    if heads is None:
        raise UserError(
            f"{source} does not say how many attention heads it has, and width {width} does not tell; "
            "set model.heads (in mae evaluate: data.heads; in mae embed, predict, explore and export: heads; in "
            "mae.load: heads=), or give the model's folder with its config.json"
        )
    if heads < 1 or width % heads:
        raise UserError(f"{source} has width {width}, which {heads} heads do not divide; set model.heads")
    return heads


def _image_size(tokens: int, patch: tuple[int, int], facts: Facts, source: str) -> tuple[int, int]:
    """Return the size of the images: as the config says if it fits the table of positions, else that of a square."""
    size = facts.image_size
    if size is not None and (size[0] // patch[0]) * (size[1] // patch[1]) == tokens - 1:
        return size
    side = math.isqrt(tokens - 1)
    if size is not None or side == 0 or side * side != tokens - 1:
        says = "no config says the size of its images" if size is None else f"its config says {size[0]}x{size[1]}"
        raise UserError(
            f"{source} has {tokens} positions for patches of {patch[0]}x{patch[1]}, which is no square grid and a "
            f"class token; {says}"
        )
    return side * patch[0], side * patch[1]


def _require_encoder(weights: Mapping[str, Tensor], description: ModelDescription, source: str) -> None:
    """Raise a `UserError` that names the first tensors of the encoder that are missing or have another shape."""
    with torch.device("meta"):
        encoder = build_encoder(
            description.encoder(), description.image_size, description.channels, pool=description.pool
        )
    wanted, given = encoder_part(encoder.state_dict()), encoder_part(weights)
    wrong = _differences(wanted, given)
    if wrong:
        raise UserError(f"{source} is not a plain ViT: {first_of(wrong, most=4)}; give another model")


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is one too many" for name in given if name not in wanted]
    return wrong + [
        f"{name} is {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]


def _with_decoder(
    found: Recognised, facts: Facts, description: ModelDescription, remarks: list[str]
) -> tuple[Recognised, DecoderDescription | None]:
    """Describe the decoder; one that cannot be used is left out."""
    if not has_decoder(found.weights):
        return found, None
    names = [name for name in found.weights if has_decoder([name])]
    decoder = _decoder(found.weights, facts)
    if decoder is None:
        return found.without(names, "decoder of which the number of heads is not known"), None
    settings = replace(description, decoder=decoder).autoencoder()
    assert settings is not None
    with torch.device("meta"):
        wanted = file_tensors(MaskedAutoencoder(settings, description.image_size, description.channels))
    decoder_alone = {name: tensor for name, tensor in wanted.items() if has_decoder([name])}
    if wrong := _differences(decoder_alone, {name: found.weights[name] for name in names}):
        return found.without(names, f"decoder of another kind: {wrong[0]}"), None
    if facts.norm_pix_loss is None:
        remarks.append("its decoder is taken to predict plain pixels, as the published ones do (norm_pix_loss False)")
    return found, decoder


def _decoder(weights: Mapping[str, Tensor], facts: Facts) -> DecoderDescription | None:
    """Return what the tensors and the config say of the decoder; None if its number of heads is not known."""
    token = weights.get("mask_token")
    width = 0 if token is None else token.shape[-1]
    usual = width // _DECODER_HEAD_CHANNELS if width in _DECODER_WIDTHS else None
    heads, ratio = facts.decoder_heads or usual, facts.mask_ratio
    depth = len({name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")})
    if not heads or not width or not depth or width % heads or width % 4:
        return None
    mask_ratio = ratio if ratio is not None and 0 < ratio < 1 else _MASK_RATIO
    return DecoderDescription("self", width, depth, heads, "random", mask_ratio, facts.norm_pix_loss is True)


def _with_head(found: Recognised, facts: Facts, description: ModelDescription) -> tuple[Recognised, ModelDescription]:
    """Describe a linear head as that of a classifier; any other head is left out."""
    weights, names = found.weights, [name for name in found.weights if name.startswith("head.")]
    if not names:
        return found, description
    shapes = [list(weights[name].shape) if name in weights else [] for name in _HEAD]
    problem = None
    if len(shapes[0]) != 2 or shapes[0][1] != description.width or shapes[1] != shapes[0][:1]:
        problem = "head of another kind"
    elif any("pre_logits" in name for name in found.left_out):
        problem = "head above a layer that is left out"
    elif facts.head_reads != "cls":
        problem = "head that reads the mean of normed patch tokens"
    elif description.decoder is not None:
        problem = "head beside a decoder"
    if problem is not None:
        return found.without(names, problem), description
    kind = head_of(weights)
    classes = facts.classes if kind is not None and len(facts.classes or ()) == kind[1] else None
    return found, replace(description, kind="classifier", classes=classes)
