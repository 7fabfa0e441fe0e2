"""Weights on disk: the layout of the published files, and loading an encoder out of any of ours.

A whole-model file holds timm's encoder keys (`blocks.0.attn.qkv.weight`) beside the decoder's
(`decoder_blocks.0...`, `mask_token`), as the published pretraining files do.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError, first_of
from mae.files import write_atomically

_DECODER_PREFIXES = ("decoder_", "mask_token")
_HEAD_PREFIXES = ("head.", "fc_norm.")


def name_in_file(name: str) -> str:
    """The name in a file of what is called `name` in an autoencoder or classifier."""
    return name.removeprefix("encoder.").removeprefix("decoder.")


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights of an autoencoder or classifier under their names in a file, where they are: no copies."""
    return {name_in_file(name): tensor.detach() for name, tensor in model.state_dict().items()}


def load_all(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load every tensor of a file that `file_tensors` filled.

    Raises:
        UserError: if the tensors are not those of this model, naming the first that differ.
    """
    names = {name_in_file(name): name for name in model.state_dict()}
    require_same_tensors(file_tensors(model), weights, source)
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})


def encoder_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors of a whole-model or classifier file, under timm's names."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(_DECODER_PREFIXES + _HEAD_PREFIXES)}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: if it is missing or no intact safetensors file.
    """
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights file {path} is no intact safetensors file: {error}") from None
    return weights


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which appears whole, and which others may read as far as the umask lets them."""
    # safetensors' own `save_file` makes files that nobody but their owner may read.
    write_atomically(path, save(dict(weights), metadata=dict(metadata)))


def load_encoder(model: VisionTransformer, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load the encoder of `weights` into an encoder or classifier, whose head stays as it is.

    Raises:
        UserError: if the tensors are not those of this model, naming the first that differ.
    """
    given = encoder_part(weights)
    require_same_tensors(encoder_part(model.state_dict()), given, source)
    model.load_state_dict(given, strict=False)


def require_same_tensors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: Path) -> None:
    """Raise a `UserError` that names the first tensors of a file which are not the wanted ones in name and shape."""
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is not known" for name in given if name not in wanted]
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
