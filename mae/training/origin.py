"""Origin of a new run's weights: the model of an earlier run, perhaps trained on images of another size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mae.data.settings import DataSettings
from mae.data.source import Source
from mae.data.wide import require_value_range
from mae.errors import UserError
from mae.models.description import ModelDescription, find_model, read_description
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.vit import TokenKind
from mae.models.weights import for_grid, has_decoder, read_weights
from mae.training.foreign_file import refuse_foreign_file
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import SCRATCH, TrainSettings


@dataclass(frozen=True)
class Origin:
    """Model to begin from."""

    init: str
    """Setting that named it."""
    path: Path
    model: ModelDescription
    has_decoder: bool

    def weights(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return its tensors, resampled for a `grid` of (rows, columns) of patches."""
        return for_grid(read_weights(self.path), self.model.grid, grid)


def find_origin(init: str, run: RunFolder) -> Origin | None:
    """Return the model that the setting `init` names: a finished run, a checkpoint, or a file.

    Returns None for a `run` that has a checkpoint of its own to resume from: the model may be gone by then.

    Raises:
        UserError: if it does not exist, or was not written by this program.
    """
    if init == SCRATCH or any(run.checkpoints.glob("step-*")):
        return None
    path = find_model(Path(init))
    refuse_foreign_file(path)
    model = read_description(path)
    with safe_open(path, framework="pt") as file:
        return Origin(init, path, model, has_decoder(file.keys()))


def with_statistics(
    settings: TrainSettings, source: Source, say: Callable[[str], None], pool: TokenKind = "cls"
) -> DataSettings:
    """Return the data settings of a run with mean and std filled in.

    Takes the first that is known: the statistics of the settings, of the run so far, of the model that `init` names, of
    the data.

    Raises:
        UserError: if `init` names another model than the settings describe, or mean and std cannot be found.
    """
    folder = RunFolder(settings.run_dir)
    data = folder.with_its_statistics(settings.data)
    origin = find_origin(settings.init, folder)
    if origin is not None:
        data = inherit_normalization(origin, settings.model, data, say)
        if (origin.model.pool == "avg") != (pool == "avg"):
            say(f"{origin.path} pools by {origin.model.pool}, the new model by {pool}: its last norm starts anew")
    require_value_range(source, data)
    return source.with_statistics(data, say)


def inherit_normalization(
    origin: Origin, settings: EncoderSettings, data: DataSettings, say: Callable[[str], None]
) -> DataSettings:
    """Return `data` with mean, std and range as set, or else as `origin` was trained with; report other differences.

    Raises:
        UserError: if the settings describe another encoder, other channels or another decoder than `origin` holds.
    """
    trained = origin.model
    encoder = settings.shape._asdict() | {"patch_size": settings.patch, "channels": data.channels}
    if differing := _differences(trained, encoder):
        raise UserError(
            f"init {origin.init} was trained with {differing}; set model.* and data.channels to the same values"
        )
    if isinstance(settings, MaskedAutoencoderSettings):
        _compare_decoders(origin, settings, say)
    if data.size != trained.image_size:
        say(
            f"{origin.path} was trained on images of {_by(trained.image_size)}, data.image_size is {_by(data.size)}: "
            "its positions are resampled"
        )
    value_range = data.value_range or trained.value_range
    if value_range != trained.value_range:
        say(f"data.value_range differs from {trained.value_range}, with which {origin.path} was trained")
        return replace(data, value_range=value_range)  # mean and std of other values
    mean, std = data.mean or trained.mean, data.std or trained.std
    if (mean, std) != (trained.mean, trained.std):
        say(
            f"data.mean and data.std differ from {trained.mean} and {trained.std}, which {origin.path} was trained with"
        )
    return replace(data, mean=mean, std=std, value_range=value_range)


def _compare_decoders(origin: Origin, settings: MaskedAutoencoderSettings, say: Callable[[str], None]) -> None:
    """Refuse a decoder that differs from the settings; one may be missing, or too old to be described."""
    trained = origin.model.decoder
    if not origin.has_decoder:
        say(f"{origin.path} holds no decoder: its encoder gets a new one")
    elif trained is not None:
        if differing := _differences(trained, {"kind": settings.decoder} | settings.decoder_shape._asdict()):
            raise UserError(
                f"init {origin.init} has a decoder of {differing}; set model.decoder* to the same values, or begin "
                f"from its encoder with a new decoder: mae export {origin.init} --out ENCODER, then --init ENCODER"
            )
        if trained.norm_pix_loss != settings.norm_pix_loss:
            say(f"the decoder of {origin.path} learned another target: model.norm_pix_loss {trained.norm_pix_loss}")


def _differences(trained: object, asked: Mapping[str, object]) -> str:
    pairs = [(name, getattr(trained, name), value) for name, value in asked.items()]
    return "; ".join(f"{name} {old}, settings ask for {new}" for name, old, new in pairs if old != new)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
