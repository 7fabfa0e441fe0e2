"""Model files: names of their tensors, and how encoder and decoder are loaded from them.

The file of a whole model has timm's names for the encoder (`blocks.0.attn.qkv.weight`) and the published ones for the
decoder (`decoder_blocks.0...`, `mask_token`). A decoder's tensors with other names keep the prefix `decoder.` of their
module, so that none of them is taken for a tensor of the encoder.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError, first_of
from mae.files import written_atomically
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.positions import resample_positions
from mae.safetensors_file import chunks

# Names of a decoder's tensors in the published files, and of those that are not published.
_PUBLISHED_DECODER = ("decoder_", "mask_token")
_DECODER_PREFIXES = (*_PUBLISHED_DECODER, "decoder.")
_HEAD_PREFIXES = ("head.",)
# The last norm, of each token or, in a classifier that pools by `avg`, of the mean of the patch tokens.
_TOKEN_NORM, _MEAN_NORM = "norm.", "fc_norm."
_POSITIONS = ("pos_embed", "decoder_pos_embed")


def name_in_file(name: str) -> str:
    """Return the name in a file of the tensor `name` of an autoencoder or classifier."""
    of_decoder = name.removeprefix("decoder.")
    return of_decoder if of_decoder.startswith(_PUBLISHED_DECODER) else name.removeprefix("encoder.")


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights of an autoencoder or classifier by their names in a file, without copying them.

    They have parameters only, no buffers. A state dict would take apart weights that FSDP2 has gathered.
    """
    return {name_in_file(name): parameter.detach() for name, parameter in model.named_parameters()}


def load_all(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load every tensor of a file that `file_tensors` filled.

    Raises:
        UserError: if the tensors are not those of this model, naming the first that differ.
    """
    names = {name_in_file(name): name for name in model.state_dict()}
    require_same_tensors(file_tensors(model), weights, source)
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})


def encoder_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors, out of those of an autoencoder or classifier, by timm's names."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(_DECODER_PREFIXES + _HEAD_PREFIXES)}


def has_decoder(names: Iterable[str]) -> bool:
    """Return whether some of these names in a file belong to a decoder."""
    return any(name.startswith(_DECODER_PREFIXES) for name in names)


def for_grid(weights: Mapping[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """Return weights with their positions resampled from one grid of (rows, columns) of patches to another."""
    fitting = (old[0] * old[1] + 1,)  # a table of another size is refused when it is loaded
    return {
        name: resample_positions(tensor, old, new) if name in _POSITIONS and tensor.shape[1:2] == fitting else tensor
        for name, tensor in weights.items()
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        # torch raises RuntimeError for a file that is removed after safetensors has read its header.
        problem = f"is not an intact safetensors file: {error}" if path.exists() else "does not exist"
        raise UserError(f"weights file {path} {problem}") from None
    return weights


def require_finite(weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise a `UserError` that names the first tensors with a value that is not finite, whose outputs mean nothing."""
    if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{source} holds values that are not finite, in {first_of(wrong, most=2)}; give an earlier checkpoint, or "
            "another file"
        )


def holds_tensors(path: Path, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a file holds tensors equal to these, whatever its header says beside them."""
    if not path.is_file():
        return False
    try:
        found = read_weights(path)
    except UserError:
        return False
    return found.keys() == weights.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.cpu()) for name, tensor in weights.items()
    )


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file atomically, and return its sha256; other users may read it as the umask allows."""
    # safetensors' own `save_file` makes files that only their owner may read.
    digest = hashlib.sha256()
    with written_atomically(path) as file:
        for chunk in chunks(weights, metadata):
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def load_encoder(model: VisionTransformer, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load the encoder's part of `weights` into an encoder or classifier, whose head stays as it is.

    If only one of them pools by `avg`, the last norm of the model stays as it is too.

    Raises:
        UserError: if the tensors are not those of this model, naming the first that differ.
    """
    given, wanted = encoder_part(weights), encoder_part(model.state_dict())
    if norms_the_mean(given) != norms_the_mean(wanted):
        given, wanted = (_without_last_norm(part) for part in (given, wanted))
    require_same_tensors(wanted, given, source)
    model.load_state_dict(given, strict=False)


def norms_the_mean(names: Iterable[str]) -> bool:
    """Return whether tensors of these names belong to a classifier that pools by `avg`, and then norms."""
    return any(name.startswith(_MEAN_NORM) for name in names)


def _without_last_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith((_TOKEN_NORM, _MEAN_NORM))}


def load_autoencoder(model: MaskedAutoencoder, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load encoder and decoder, or the encoder alone if `weights` has no decoder.

    Raises:
        UserError: if the tensors are not those of this model, naming the first that differ.
    """
    if has_decoder(weights):
        load_all(model, weights, source)
    else:
        load_encoder(model.encoder, weights, source)


def require_same_tensors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: Path) -> None:
    """Raise a `UserError` that names the first tensors of a file whose name or shape is not as wanted."""
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    wrong += [
        f"{name} is {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if wrong:
        raise UserError(
            f"{source} holds another model than the settings ask for: {first_of(wrong, most=4)}; "
            "set model.* and data.image_size as they were when it was trained"
        )
