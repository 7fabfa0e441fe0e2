"""Weights on disk: the layout of the published files, and loading an encoder out of any of ours.

A whole-model file holds timm's encoder keys (`blocks.0.attn.qkv.weight`) beside the decoder's
(`decoder_blocks.0...`, `mask_token`), as the published pretraining files do. What a decoder calls otherwise
keeps its module's name, `decoder.`, so that no name of a decoder is taken for one of the encoder.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError, first_of
from mae.files import write_atomically
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.positions import resample_positions

# Names of a decoder's tensors in the published files, and of those that are not published.
_PUBLISHED_DECODER = ("decoder_", "mask_token")
_DECODER_PREFIXES = (*_PUBLISHED_DECODER, "decoder.")
_HEAD_PREFIXES = ("head.", "fc_norm.")
_POSITIONS = ("pos_embed", "decoder_pos_embed")


def name_in_file(name: str) -> str:
    """The name in a file of what is called `name` in an autoencoder or classifier."""
    of_decoder = name.removeprefix("decoder.")
    return of_decoder if of_decoder.startswith(_PUBLISHED_DECODER) else name.removeprefix("encoder.")


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


def has_decoder(names: Iterable[str]) -> bool:
    """Whether these are the names of a whole-model file."""
    return any(name.startswith(_DECODER_PREFIXES) for name in names)


def for_grid(weights: Mapping[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """The weights of a model of one grid of patches, for a model of another: with its positions resampled."""
    fitting = (old[0] * old[1] + 1,)  # what is not is for the loaders to complain of
    return {
        name: resample_positions(tensor, old, new) if name in _POSITIONS and tensor.shape[1:2] == fitting else tensor
        for name, tensor in weights.items()
    }


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


def load_autoencoder(model: MaskedAutoencoder, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load encoder and decoder; of `weights` without a decoder the encoder alone.

    Raises:
        UserError: if the tensors are not those of this model, naming the first that differ.
    """
    if has_decoder(weights):
        load_all(model, weights, source)
    else:
        load_encoder(model.encoder, weights, source)


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
