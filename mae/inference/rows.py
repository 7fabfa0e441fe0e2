"""Rows of the tables that `mae predict` and `mae embed` write."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from mae.inference.image_set import ImageSet
from mae.inference.model import Model
from mae.inference.parts import Part
from mae.inference.prediction import most_probable
from mae.models.readout import NormKind, select
from mae.models.vit import TokenKind
from mae.output import valid_text

_COMMON = [pa.field("key", pa.string()), pa.field("label", pa.int64()), pa.field("class", pa.string())]
_ERROR = pa.field("error", pa.string())
# With this note, Hugging Face's `datasets` shows the column as images.
_IMAGE_NOTE = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


class Rows(ABC):
    """Maker of the rows of a table."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Columns of the table."""

    @property
    @abstractmethod
    def choices(self) -> dict[str, Any]:
        """Settings that decide the rows, as a JSON mapping."""

    @abstractmethod
    def compute(self, views: Tensor) -> Tensor:
        """Return the results of a batch of views, one row per image, on the CPU."""

    def extra(self, view: Tensor) -> Any:
        """Return what a row needs of the view itself; None for nothing."""
        return None

    @abstractmethod
    def __call__(self, part: Part) -> Mapping[str, Sequence[Any]]:
        """Return the columns of a part."""


@dataclass(frozen=True)
class PredictedRows(Rows):
    """Rows with the most probable classes of each image."""

    images: ImageSet
    model: Model
    top: int

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table."""
        fields = [
            *_COMMON,
            _ERROR,
            pa.field("classes", pa.list_(pa.string())),
            pa.field("labels", pa.list_(pa.int64())),
            pa.field("probabilities", pa.list_(pa.float64())),
        ]
        return pa.schema(fields)

    @property
    def choices(self) -> dict[str, Any]:
        """Settings that decide the rows."""
        return {"top": self.top}

    def compute(self, views: Tensor) -> Tensor:
        """Return the logits of a batch of views."""
        return self.model.logits_of(views)

    def __call__(self, part: Part) -> Mapping[str, Sequence[Any]]:
        """Return the columns of a part."""
        found = most_probable(part.results, self.model.classes, self.top)
        good = [None if number in part.reasons else row for number, row in zip(part.numbers, found, strict=True)]
        return _common(self.images, self.model, part) | {
            "classes": [row and list(map(valid_text, row.names)) for row in good],
            "labels": [row and list(row.labels) for row in good],
            "probabilities": [row and list(row.probabilities) for row in good],
        }


@dataclass(frozen=True)
class EmbeddedRows(Rows):
    """Rows with the feature of each image, its predicted class where there is a head, and a thumbnail."""

    images: ImageSet
    model: Model
    tokens: TokenKind
    norm: NormKind
    thumbnail: int
    """Longest side of the thumbnail [pixels]; 0 for none."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table."""
        predicted = [pa.field("predicted", pa.string()), pa.field("probability", pa.float64())]
        image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        fields = [
            *_COMMON,
            _ERROR,
            *(predicted if self.model.has_head else []),
            pa.field("embedding", pa.list_(pa.float32())),
            *([image] if self.thumbnail else []),
        ]
        return pa.schema(fields, metadata=_IMAGE_NOTE if self.thumbnail else None)

    @property
    def choices(self) -> dict[str, Any]:
        """Settings that decide the rows."""
        return {"tokens": self.tokens, "norm": self.norm, "thumbnail": self.thumbnail}

    def compute(self, views: Tensor) -> Tensor:
        """Return features, and behind them logits if the model has a head, of a batch of views."""
        if not self.model.has_head:
            return select(self.model.features_of(views), self.tokens, self.norm)
        features, logits = self.model.features_and_logits_of(views)
        return torch.cat([select(features, self.tokens, self.norm), logits], dim=1)

    def extra(self, view: Tensor) -> dict[str, Any] | None:
        """Return a view as a small PNG of its first channel, or first three; None without thumbnails."""
        if not self.thumbnail:
            return None
        pixels = view.permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0])
        picture.thumbnail((self.thumbnail, self.thumbnail))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    def __call__(self, part: Part) -> Mapping[str, Sequence[Any]]:
        """Return the columns of a part."""
        classes = len(self.model.classes)
        features = part.results[:, : part.results.shape[1] - classes].numpy()
        columns = _common(self.images, self.model, part)
        bad = [number in part.reasons for number in part.numbers]
        columns["embedding"] = [None if is_bad else row for is_bad, row in zip(bad, features, strict=True)]
        if classes:
            best = most_probable(part.results[:, -classes:], self.model.classes, 1)
            good = [None if is_bad else row for is_bad, row in zip(bad, best, strict=True)]
            columns["predicted"] = [row and valid_text(row.names[0]) for row in good]
            columns["probability"] = [row and row.probabilities[0] for row in good]
        if self.thumbnail:
            columns["image"] = part.extras
        return columns


def _common(images: ImageSet, model: Model, part: Part) -> dict[str, Sequence[Any]]:
    labels = [images.label(number) for number in part.numbers]
    return {
        "key": [valid_text(images.name(number)) for number in part.numbers],
        "label": labels,
        "class": [None if label is None else _class_name(images, model, label) for label in labels],
        "error": [_reason(part.reasons.get(number)) for number in part.numbers],
    }


def _class_name(images: ImageSet, model: Model, label: int) -> str | None:
    name = images.class_name(label)
    if name is None and label < len(model.classes):
        name = model.classes[label]
    return None if name is None else valid_text(name)


def _reason(reason: str | None) -> str | None:
    return None if reason is None else valid_text(reason)
