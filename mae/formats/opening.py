"""Models of this program and of other libraries, opened in one way."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae.errors import UserError
from mae.files import open_regular
from mae.formats.addresses import fetched, is_address
from mae.formats.config_values import number, read_json, size_pair, whole
from mae.formats.describing import describe
from mae.formats.facts import LAYER_NORM_EPS, Facts, facts_of
from mae.formats.recognition import is_of_another_library, recognise
from mae.formats.report import KeyReport
from mae.formats.timm_config import timm_facts
from mae.formats.transformers_config import transformers_facts
from mae.formats.weight_files import WEIGHT_FILES, StoredTensors, read_tensors
from mae.models.description import (
    MODEL_FILE,
    ModelDescription,
    find_best_model,
    find_model,
    parse_description,
    read_description,
)
from mae.models.weights import has_decoder, read_weights
from mae.output import warn
from mae.run_files import beside
from mae.settings import check

_OURS = "mae"
_CONFIG, _PROCESSOR, _ARGUMENTS = "config.json", "preprocessor_config.json", "arguments.json"
_IMAGENET = "0.485 0.456 0.406 and 0.229 0.224 0.225"


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel of the images, on a scale of 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class StoredModel:
    """Model in a file of this program or of another library."""

    source: str
    """Place as it was given."""
    path: Path
    """File that holds its weights."""
    description: ModelDescription
    """Description; mean and std are empty if nothing says them, see `require_normalization`."""
    names: tuple[str, ...]
    """Names of its tensors, by our names."""
    report: KeyReport | None = field(default=None, compare=False)
    """What became of each tensor of a file of another library; None for a file of this program."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Tensors of a file of another library, by our names, as it holds them."""
    files: tuple[Path, ...] = ()
    """Files of another library that hold them."""
    eps: float = LAYER_NORM_EPS
    """Number that its layer norms add to a variance."""

    @property
    def is_ours(self) -> bool:
        """Whether this program wrote it."""
        return self.report is None

    @property
    def summary(self) -> str:
        """Report of a model of another library that is used as it is, to follow its name; empty for one of ours."""
        return "" if self.report is None else f" {self.report}"

    def beside(self, name: str) -> Path:
        """Return the place for results of that name beside the model; for one in the cache of the hub, a place here."""
        return Path(name) if is_address(self.source) else beside(self.path, name)

    @property
    def has_decoder(self) -> bool:
        """Whether it holds a decoder."""
        return has_decoder(self.names)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Tensors by our names, in float32 if another library wrote them."""
        if self.is_ours:
            return read_weights(self.path)
        assert self.tensors, "they were let go of once the network was built"
        return {name: tensor.float() for name, tensor in self.tensors.items()}

    @cached_property
    def sha256(self) -> str:
        """Hash of the file; of a model of another library, of its files and of its description."""
        if self.is_ours:
            return _sha256(self.path)
        text = "\n".join([*map(_sha256, self.files), *self.description.metadata().values()])
        return hashlib.sha256(text.encode()).hexdigest()

    def require_normalization(self) -> "StoredModel":
        """Return the model itself.

        Raises:
            UserError: if nothing says the mean and the deviation of its images.
        """
        if not self.description.mean:
            raise UserError(
                f"{self.source} does not say how its images were normalised; set data.mean and data.std (in mae embed, "
                "predict, explore and export: mean and std; in mae.load: mean=, std=), "
                f"which are {_IMAGENET} for the models published for ImageNet"
            )
        return self


def open_model(
    source: str | PathLike[str],
    normalization: Normalization | None = None,
    heads: int | None = None,
    best: bool = False,
) -> StoredModel:
    """Open a model of this program or of another library.

    Args:
        source: Folder of a finished run, a checkpoint, an export, a model folder of timm or transformers; a file of
            weights of this program, timm, torchvision, transformers or the original MAE code; `hub:OWNER/NAME` or
            `timm:NAME`.
        normalization: Mean and std of a model that does not say its own; else others than its own give a warning.
        heads: Number of attention heads of a model that does not say it, likewise.
        best: Whether to take, of a fine-tuning run that measured its accuracy, the best model.

    Raises:
        UserError: if there is no model, it is damaged, it asks for code, or it is of a kind that cannot be read.
    """
    given = fspath(source)
    path = _weights_of(fetched(given) if is_address(given) else Path(given), best)
    if _is_ours(path):
        with safe_open(path, framework="pt") as file:
            stored = StoredModel(given, path, read_description(path), tuple(file.keys()))
    else:
        stored = _open_foreign(given, path, heads)
    _warn_of_unused(stored, normalization, heads)
    if normalization is None or stored.description.mean:
        return stored
    if not len(normalization.mean) == len(normalization.std) == stored.description.channels:
        raise UserError(
            f"{given} has {stored.description.channels} channels, but {len(normalization.mean)} means and "
            f"{len(normalization.std)} deviations are given; give one of each for each channel"
        )
    check(all(0 < each < math.inf for each in normalization.std), "std", normalization.std, "numbers above 0")
    check(all(map(math.isfinite, normalization.mean)), "mean", normalization.mean, "finite numbers")
    return replace(stored, description=replace(stored.description, mean=normalization.mean, std=normalization.std))


def _warn_of_unused(stored: StoredModel, normalization: Normalization | None, heads: int | None) -> None:
    """Warn if a number was given that is not taken, because the model says another."""
    own = stored.description
    if normalization is not None and own.mean and normalization != (own.mean, own.std):
        warn(f"{stored.source} says its own mean and std, {own.mean} and {own.std}; those given are not used")
    if heads is not None and heads != own.heads:
        warn(f"{stored.source} says that it has {own.heads} heads; the {heads} given are not used")


def _weights_of(place: Path, best: bool) -> Path:
    """Return the file of a model's weights: as this program names it, or as another library does."""
    try:
        return find_best_model(place) if best else find_model(place)
    except UserError:
        others = [place / name for name in WEIGHT_FILES if name != MODEL_FILE and (place / name).is_file()]
        if not others:
            raise
        return others[0]


def _is_ours(path: Path) -> bool:
    """Return whether this program wrote a file, with its own names of tensors."""
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return _OURS in (file.metadata() or {}) and not is_of_another_library(file.keys())
    return False


def _open_foreign(source: str, path: Path, heads: int | None) -> StoredModel:
    found = read_tensors(path)
    _require_numbers(found.tensors, path)
    header = parse_description(found.header[_OURS], path) if _OURS in found.header else None
    facts = _facts(path, found) if header is None else facts_of(header)
    recognised = recognise(found.tensors, source)
    _require_floating_point(recognised.weights, path)
    described = describe(recognised, facts, heads, source)
    description, recognised = described.description, described.found
    if header is not None:
        temperature = header.position_temperature
        description = replace(description, position_temperature=temperature)
        if description.decoder is not None:
            description = replace(description, decoder=header.decoder)
    report = KeyReport(recognised.format, tuple(recognised.weights), recognised.left_out, remarks=described.remarks)
    return StoredModel(
        source, path, description, tuple(recognised.weights), report, recognised.weights, found.files, facts.eps
    )


def _require_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise a `UserError` if a tensor is not an array of plain numbers: sparse, quantised, or without its values."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "without its values" if tensor.is_meta else "sparse"
            raise UserError(f"{path} holds {name} {kind}; allowed: floating-point weights")


def _require_floating_point(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise a `UserError` if a tensor by our name is of another type; what is left out may be, such as a count."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path} holds {name} as {tensor.dtype}; allowed: floating-point weights")


def _facts(path: Path, found: StoredTensors) -> Facts:
    """Return what the files beside the weights say, and the arguments of the training program in them.

    Without a config.json, these are the arguments of torchvision's ViT, as an export of ours has them.
    """
    config = read_json(path.with_name(_CONFIG)) if path.name in WEIGHT_FILES else None
    if config is None:
        arguments = found.arguments
        normalized = arguments.get("norm_pix_loss")
        built = (read_json(path.with_name(_ARGUMENTS)) if path.name in WEIGHT_FILES else None) or {}
        return Facts(
            heads=whole(built.get("num_heads")),
            width=whole(built.get("hidden_dim")),
            depth=whole(built.get("num_layers")),
            patch_size=size_pair(built.get("patch_size")),
            image_size=size_pair(built.get("image_size")),
            mask_ratio=number(arguments.get("mask_ratio")),
            norm_pix_loss=normalized if isinstance(normalized, bool) else None,
        )
    if "architecture" in config:
        return timm_facts(config, path.with_name(_CONFIG))
    return transformers_facts(config, read_json(path.with_name(_PROCESSOR)) or {}, path.with_name(_CONFIG))


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
