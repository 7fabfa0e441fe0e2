"""Description of a model in the header of its file: architecture, normalisation, decoder."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from mae.classes import require_same_classes
from mae.errors import UserError, first_of
from mae.models.masking import MaskKind
from mae.models.patches import grid_size
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.sizes import TEMPERATURE
from mae.models.vit import TokenKind
from mae.run_files import UNFINISHED

ModelKind = Literal["masked autoencoder", "classifier"]
MODEL_FILE, BEST_FILE = "model.safetensors", "best.safetensors"
"""Names in a run folder of the last model, and of the best classifier on the evaluation shards."""
_FIELD = "mae"
# Larger widths, images and counts are mistakes or attacks: nobody could build the model.
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class DecoderDescription:
    """Architecture of the decoder, and the task that it was trained on."""

    kind: str
    width: int
    depth: int
    heads: int
    mask: MaskKind
    mask_ratio: float
    norm_pix_loss: bool


@dataclass(frozen=True)
class ModelDescription:
    """Architecture of the encoder, normalisation of its images, and the decoder."""

    kind: ModelKind
    width: int
    depth: int
    heads: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    decoder: DecoderDescription | None = None
    """Decoder; None for a classifier, for an encoder alone, and in files of versions that did not describe decoders."""
    classes: tuple[str, ...] | None = None
    """Names of the classes by label; None if the model has no classes, or they have no names."""
    value_range: tuple[float, ...] | None = None
    """Range of the values of images of more than 8 bits, as in `DataSettings.value_range`."""
    pool: TokenKind = "cls"
    """Tokens that the head of a classifier sees."""
    position_temperature: float = TEMPERATURE
    """Temperature of the sine-cosine positions that training began with; the weights hold the positions themselves."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        return grid_size(self.image_size, self.patch_size)

    def metadata(self) -> dict[str, str]:
        """Return the metadata for the header of a safetensors file."""
        # Left out at their defaults, so that versions from before these fields read the file.
        newer = {"value_range": None, "pool": "cls", "position_temperature": TEMPERATURE}
        fields = {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}
        return {"format": "pt", _FIELD: json.dumps(fields)}

    def class_names(self, count: int) -> tuple[str, ...]:
        """Return the names of so many classes by label; their numbers where they have no names."""
        names = self.classes
        return names if names is not None and len(names) == count else tuple(map(str, range(count)))

    def encoder(self) -> EncoderSettings:
        """Return settings that build this encoder."""
        return EncoderSettings(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            patch_size=self.patch_size,
            position_temperature=self.position_temperature,
        )

    def autoencoder(self) -> MaskedAutoencoderSettings | None:
        """Return settings that build encoder and decoder; None if the decoder is not described."""
        if self.decoder is None:
            return None
        return MaskedAutoencoderSettings(
            **vars(self.encoder()),
            mask=self.decoder.mask,
            mask_ratio=self.decoder.mask_ratio,
            decoder=self.decoder.kind,
            decoder_width=self.decoder.width,
            decoder_depth=self.decoder.depth,
            decoder_heads=self.decoder.heads,
            norm_pix_loss=self.decoder.norm_pix_loss,
        )


def describe_model(
    kind: ModelKind,
    encoder: EncoderSettings,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_pct: float,
    classes: tuple[str, ...] | None = None,
    value_range: tuple[float, ...] | None = None,
) -> ModelDescription:
    """Describe a model that is built from these settings; `classes` are names by label, if they are known."""
    width, depth, heads = encoder.shape
    decoder = _describe_decoder(encoder) if isinstance(encoder, MaskedAutoencoderSettings) else None
    return ModelDescription(
        kind=kind,
        width=width,
        depth=depth,
        heads=heads,
        patch_size=encoder.patch,
        image_size=image_size,
        channels=len(mean),
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        decoder=decoder,
        classes=classes,
        value_range=value_range,
        position_temperature=encoder.position_temperature,
    )


def _describe_decoder(settings: MaskedAutoencoderSettings) -> DecoderDescription:
    task = settings.mask, settings.mask_ratio, settings.norm_pix_loss
    return DecoderDescription(settings.decoder, *settings.decoder_shape, *task)


def read_description(path: Path) -> ModelDescription:
    """Read the description in the header of a model file.

    Raises:
        UserError: if the file is missing or damaged, or another program wrote it.
    """
    text = read_metadata(path).get(_FIELD)
    if text is None:
        raise UserError(f"model file {path} does not describe its architecture; it was not written by mae")
    return parse_description(text, path)


def parse_description(text: str, path: Path) -> ModelDescription:
    """Return the description of a model in the file `path` from its text there.

    Raises:
        UserError: if it is not as this version writes it.
    """
    try:
        fields = json.loads(text)
        _check_fields(fields)
        for name in ("patch_size", "image_size", "mean", "std"):
            fields[name] = tuple(fields[name])
        if fields.get("decoder") is not None:
            fields["decoder"] = DecoderDescription(**fields["decoder"])
        if fields.get("value_range") is not None:
            fields["value_range"] = tuple(map(float, fields["value_range"]))
        if fields.get("classes") is not None:
            fields["classes"] = tuple(fields["classes"])
        return ModelDescription(**fields)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"model file {path} describes its architecture in a way this version of mae does not know; "
            "install the version that wrote it, or give another file"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"model file {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"model file {path} is not an intact safetensors file: {error}") from None


def _check_fields(fields: Any) -> None:
    """Raise a `ValueError` or a `KeyError` unless each field has its type, and a size that a model can have."""
    _check(fields["kind"] in get_args(ModelKind), "kind")
    for name in ("width", "depth", "heads", "channels"):
        _check(_is_size(fields[name]), name)
    for name in ("patch_size", "image_size"):
        _check(_is_list(fields[name], _is_size, 2), name)
    for name in ("mean", "std"):
        _check(_is_list(fields[name], _is_finite, fields["channels"]), name)
    _check(min(fields["std"]) > 0, "std")
    _check(_is_finite(fields["crop_pct"]) and 0 < fields["crop_pct"] <= 1, "crop_pct")
    if (decoder := fields.get("decoder")) is not None:
        _check(isinstance(decoder["kind"], str) and decoder["mask"] in get_args(MaskKind), "decoder")
        _check(all(_is_size(decoder[name]) for name in ("width", "depth", "heads")), "decoder")
        _check(_is_finite(decoder["mask_ratio"]) and 0 < decoder["mask_ratio"] < 1, "decoder.mask_ratio")
        _check(isinstance(decoder["norm_pix_loss"], bool), "decoder.norm_pix_loss")
    _check(fields.get("pool", "cls") in get_args(TokenKind), "pool")
    temperature = fields.get("position_temperature", TEMPERATURE)
    _check(_is_number(temperature) and temperature > 1, "position_temperature")
    if (value_range := fields.get("value_range")) is not None:
        lengths = (2, 2 * fields["channels"])
        _check(any(_is_list(value_range, _is_number, length) for length in lengths), "value_range")
    if (classes := fields.get("classes")) is not None:
        _check(isinstance(classes, list) and all(isinstance(name, str) for name in classes), "classes")


def _check(is_right: bool, name: str) -> None:
    if not is_right:
        raise ValueError(name)


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < _MAX_SIZE  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_list(value: object, is_right: Callable[[object], bool], length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(is_right, value))


def require_same_model(trained: ModelDescription, asked: ModelDescription, source: Path) -> None:
    """Compare what the weights in `source` were trained as with what the settings ask for.

    Tensors of the same shapes may belong to other mathematics (heads), and their outputs may mean other classes.

    Raises:
        UserError: naming every difference of architecture, and the first class that differs.
    """
    names = ("kind", "width", "depth", "heads", "patch_size", "image_size", "channels", "pool", "position_temperature")
    parts: list[tuple[str, object, object, tuple[str, ...]]] = [("model", trained, asked, names)]
    if trained.decoder is not None and asked.decoder is not None:
        parts.append(("decoder", trained.decoder, asked.decoder, ("kind", "width", "depth", "heads")))
    different = [
        f"{part}.{name} is {getattr(old, name)}, settings ask for {getattr(new, name)}"
        for part, old, new, names in parts
        for name in names
        if getattr(old, name) != getattr(new, name)
    ]
    if different:
        raise UserError(
            f"{source} holds another model than the settings ask for: {first_of(different, most=9)}; "
            "set model.* and data.* as they were when it was trained"
        )
    if trained.classes is not None and asked.classes is not None:
        require_same_classes(trained.classes, str(source), asked.classes, "the shards")


def find_best_model(source: Path) -> Path:
    """Return the best model of a fine-tuning run that measured its accuracy; for any other source, `find_model`.

    Raises:
        UserError: if there is no model.
    """
    best = source / BEST_FILE
    return best if best.is_file() else find_model(source)


def find_model(source: Path) -> Path:
    """Return the model file of a finished run or of a checkpoint folder, or `source` itself if it is a file.

    Raises:
        UserError: if there is none.
    """
    if source.name.startswith(UNFINISHED):
        raise UserError(f"{source} is a checkpoint being written or removed; give one whose name begins with step-")
    path = source / MODEL_FILE if source.is_dir() else source
    if path.is_file():
        return path
    if not source.exists():
        raise UserError(f"{source} does not exist; give the folder of a finished run, or a .safetensors file")
    checkpoints = sorted((source / "checkpoints").glob("step-*"))
    if checkpoints:
        raise UserError(
            f"run {source} is not finished (no {path.name}); finish it with its own command, "
            f"or give its newest checkpoint {checkpoints[-1]}"
        )
    raise UserError(f"{source} holds no {path.name}; give the folder of a finished run, or a .safetensors file")
