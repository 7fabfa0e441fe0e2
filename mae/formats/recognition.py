"""Format of a file by the names of its tensors, and its tensors by our names."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mae.errors import UserError, first_of
from mae.formats.key_map import Renamed
from mae.formats.published import from_published
from mae.formats.torchvision_vit import NOT_OURS as NOT_OF_TORCHVISION
from mae.formats.torchvision_vit import from_torchvision
from mae.formats.transformers_vit import NOT_OURS as NOT_OF_TRANSFORMERS
from mae.formats.transformers_vit import from_transformers
from mae.formats.unlike import parts_unlike_ours, require_plain
from mae.formats.weight_files import REMEDY
from mae.models.weights import has_decoder

# Name that tells a format.
_OF_TIMM, _OF_TORCHVISION = "patch_embed.proj.weight", "conv_proj.weight"
_OF_TRANSFORMERS = "embeddings.patch_embeddings.projection.weight"
# Where training programs keep the encoder, beside other networks: its own names, MoCo v3's, DINO's.
_MOCO = "base_encoder."
_ENCODERS = ("", _MOCO, "backbone.")
# Beginnings of the names of tensors that are left behind, and why.
_LEFT_BEHIND = (
    (
        ("head.", "heads.", "fc.", "pre_logits.", "classifier.", "projector.", "predictor.", "contrastive_head."),
        "head of another kind",
    ),
    (("decoder.", "decoder_"), "decoder of another kind"),
    ((*NOT_OF_TRANSFORMERS, *NOT_OF_TORCHVISION, "mask_token", "masked_embed"), "no part of a plain ViT"),
)


@dataclass(frozen=True)
class Recognised:
    """Tensors of a file by our names, and what became of each."""

    format: str
    """Name of the library or program, for messages."""
    weights: dict[str, Tensor]
    """Tensors by our names."""
    names: Mapping[str, str]
    """Our name of each tensor that has one, by its name in the file."""
    left_out: Mapping[str, str]
    """Why each other tensor of the file has none."""
    is_moco: bool = False
    """Whether MoCo v3 has trained it, whose ViT-S has 12 heads instead of 6."""

    def without(self, dropped: Collection[str], reason: str) -> "Recognised":
        """Return the same without the tensors with these names of ours, for a reason."""
        gone = {old: reason for old, new in self.names.items() if new in dropped}
        return replace(
            self,
            weights={name: tensor for name, tensor in self.weights.items() if name not in dropped},
            names={old: new for old, new in self.names.items() if new not in dropped},
            left_out={**self.left_out, **gone},
        )


def recognise(tensors: Mapping[str, Tensor], source: str) -> Recognised:
    """Return the tensors of a file by our names.

    Raises:
        UserError: if it is no model of a known library, or has other parts than our encoder, naming them.
    """
    library, prefix, read = _library_of(tensors, source)
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    renamed = read(inner)
    others = {name: _reason(name) for name in inner if name not in renamed.names}
    require_plain(renamed.weights, [name for name, reason in others.items() if reason is None], source)
    outside = dict.fromkeys((name for name in tensors if not name.startswith(prefix)), "of another network")
    left_out = {f"{prefix}{name}": reason for name, reason in others.items() if reason is not None}
    return Recognised(
        library,
        renamed.weights,
        {f"{prefix}{old}": new for old, new in renamed.names.items()},
        {**outside, **left_out},
        is_moco=prefix == _MOCO,
    )


def is_of_another_library(names: Iterable[str]) -> bool:
    """Return whether tensors have names of another library, where it has others than this program."""
    return not {_OF_TORCHVISION, _OF_TRANSFORMERS, f"vit.{_OF_TRANSFORMERS}"}.isdisjoint(names)


def _library_of(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[str, str, Callable[[Mapping[str, Tensor]], Renamed]]:
    """Return the name of the library, what it puts before each name, and the function that renames its tensors."""
    if f"vit.{_OF_TRANSFORMERS}" in tensors or _OF_TRANSFORMERS in tensors:
        return "transformers", "", from_transformers
    if _OF_TORCHVISION in tensors:
        return "torchvision", "", from_torchvision
    prefix = next((prefix for prefix in _ENCODERS if f"{prefix}{_OF_TIMM}" in tensors), None)
    if prefix is None:
        seen = first_of(parts_unlike_ours(tensors) or sorted(tensors), most=3, separator=", ")
        raise UserError(f"{source} is no plain ViT that is known: it has {seen}; {REMEDY}")
    return ("published MAE" if has_decoder(tensors) else "timm"), prefix, from_published


def _reason(name: str) -> str | None:
    """Return why a tensor is left behind; None if it may be a part of the encoder."""
    return next((reason for beginnings, reason in _LEFT_BEHIND if name.startswith(beginnings)), None)
