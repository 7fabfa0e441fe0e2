"""Origin of a new run's weights: an earlier model, perhaps of another library, of other images or of other patches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mae.data.images.levels import ValueRange
from mae.data.settings import DataSettings
from mae.data.source import Source
from mae.data.wide import require_value_range
from mae.errors import UserError
from mae.formats.fitting import Fit, fit, report_of
from mae.formats.opening import StoredModel, open_model
from mae.formats.report import KeyReport
from mae.models.description import ModelDescription
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.vit import TokenKind
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
    stored: StoredModel

    def fit(self, grid: tuple[int, int], patch_size: tuple[int, int], channels: int) -> Fit:
        """Return its tensors for a `grid` of (rows, columns) of patches of this size, with so many channels."""
        return fit(self.stored.weights, self.model, grid, patch_size, channels)

    def weights(
        self, grid: tuple[int, int], patch_size: tuple[int, int] | None = None, channels: int | None = None
    ) -> dict[str, Tensor]:
        """Return its tensors as `fit` does; without patch size or channels, these stay as they are."""
        return self.fit(grid, patch_size or self.model.patch_size, channels or self.model.channels).weights

    def report(self, names: Iterable[str], data: DataSettings, model: EncoderSettings) -> KeyReport | None:
        """Return what becomes of each tensor in a model with tensors of these names.

        Returns None for a model of this program whose tensors fit, except perhaps the positions.
        """
        is_adapted = (self.model.patch_size, self.model.channels) != (model.patch, data.channels)
        if self.stored.is_ours and not is_adapted:
            return None
        return report_of(self.stored, self.fit(model.grid(data.size), model.patch, data.channels), names)


def find_origin(init: str, run: RunFolder, heads: int | None = None) -> Origin | None:
    """Return the model that the setting `init` names, as `mae.formats.opening.open_model` takes it.

    Returns None for a `run` that has a checkpoint of its own to resume from: the model may be gone by then. `heads` is
    the number of attention heads of a model that does not say it.

    Raises:
        UserError: if it does not exist, or cannot be read.
    """
    if init == SCRATCH or any(run.checkpoints.glob("step-*")):
        return None
    stored = open_model(init, heads=heads)
    return Origin(init, stored.path, stored.description, stored.has_decoder, stored)


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
    origin = find_origin(settings.init, folder, settings.model.heads)
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
        UserError: if the settings describe another encoder or another decoder than `origin` holds, or nothing says mean
            and std.
    """
    trained = origin.model
    # Only a file of this program says it. The tables of others may be learned.
    positions = {"position_temperature": settings.position_temperature} if origin.stored.is_ours else {}
    if differing := _differences(trained, settings.shape._asdict() | positions):
        raise UserError(f"init {origin.init} was trained with {differing}; set model.* to the same values")
    adapted = _adaptation(origin, settings.patch, data.channels)
    if adapted:
        say(adapted)
    if isinstance(settings, MaskedAutoencoderSettings):
        _compare_decoders(origin, settings, bool(adapted), say)
    if data.size != trained.image_size:
        say(
            f"{origin.path} was trained on images of {_by(trained.image_size)}, data.image_size is {_by(data.size)}: "
            "its positions are resampled"
        )
    if data.channels != trained.channels:
        return replace(data, value_range=data.value_range or _of_any_channel(trained.value_range))
    value_range = data.value_range or trained.value_range
    if value_range != trained.value_range:
        say(f"data.value_range differs from {trained.value_range}, with which {origin.path} was trained")
        return replace(data, value_range=value_range)  # mean and std of other values
    if data.mean is None:
        origin.stored.require_normalization()
    mean, std = data.mean or trained.mean, data.std or trained.std
    if trained.mean and (mean, std) != (trained.mean, trained.std):
        say(
            f"data.mean and data.std differ from {trained.mean} and {trained.std}, which {origin.path} was trained with"
        )
    return replace(data, mean=mean, std=std, value_range=value_range)


def _adaptation(origin: Origin, patch: tuple[int, int], channels: int) -> str:
    """Return in words how the patch embedding is adapted; nothing if it fits."""
    trained = origin.model
    changes: list[str] = []
    if patch != trained.patch_size:
        changes.append(f"patches of {_by(trained.patch_size)} (model.patch_size is {_by(patch)})")
    if channels != trained.channels:
        changes.append(f"{trained.channels} channels (data.channels is {channels}; its mean and std are not used)")
    if not changes:
        return ""
    return f"{origin.path} was trained with {' and '.join(changes)}: its patch embedding is adapted"


def _of_any_channel(value_range: ValueRange) -> ValueRange:
    """Return a range of values that is one for all channels; None for one that differs between them."""
    return value_range if value_range is not None and len(value_range) == 2 else None


def _compare_decoders(
    origin: Origin, settings: MaskedAutoencoderSettings, predicts_others: bool, say: Callable[[str], None]
) -> None:
    """Refuse a decoder that differs from the settings; one may be missing, too old to be described, or left out."""
    trained = origin.model.decoder
    if not origin.has_decoder:
        say(f"{origin.path} holds no decoder: its encoder gets a new one")
    elif predicts_others:
        say(f"the decoder of {origin.path} predicts other pixels: its encoder gets a new one")
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
