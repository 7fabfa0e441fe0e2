"""Models of a run, loaded one at a time as they are asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock

from mae.errors import UserError
from mae.explore.stops import Stop
from mae.formats.opening import Normalization, open_model
from mae.inference.model import Model, load_stored
from mae.models.description import ModelDescription
from mae.output import warn

_LOADED = 3
"""Number of models that are kept in memory."""


class RunModels:
    """Models of a run, which several threads may use in turn."""

    def __init__(
        self, stops: Sequence[Stop], normalization: Normalization | None = None, heads: int | None = None
    ) -> None:
        """Load the last model that can be read, and warn of each after it that cannot.

        Args:
            stops: Models, in the order of training.
            normalization: Mean and std of models that do not say their own.
            heads: Number of attention heads, likewise.

        Raises:
            UserError: if none can be read.
        """
        self.stops = stops
        self._given = normalization, heads
        # Attention is read by a hook on a layer, so a model computes for one thread at a time.
        self._lock = Lock()
        self._load = lru_cache(maxsize=_LOADED)(self._open)
        self.last, self.description = self._last_readable()

    @contextmanager
    def use(self, number: int) -> Iterator[Model]:
        """Give the model of a stop, to this thread alone.

        Raises:
            UserError: if there is no such stop, or its model cannot be read or takes other images than the last.
        """
        if not 0 <= number < len(self.stops):
            raise UserError(f"there is no checkpoint {number + 1}; allowed: 1 to {len(self.stops)}")
        with self._lock:
            model = self._load(number)
            if _images_of(model.description) != _images_of(self.description):
                raise UserError(f"{model.path} takes other images than the last model of the run; look at it by itself")
            yield model

    def _open(self, number: int) -> Model:
        return load_stored(open_model(self.stops[number].path, *self._given, best=True))

    def _last_readable(self) -> tuple[int, ModelDescription]:
        reasons: list[UserError] = []
        for number in reversed(range(len(self.stops))):
            try:
                description = self._load(number).description
            except UserError as error:
                reasons.append(error)
                continue
            for reason in reasons:
                warn(f"a model of the run cannot be shown: {reason}")
            return number, description
        raise reasons[0]


def _images_of(description: ModelDescription) -> tuple[object, ...]:
    return description.image_size, description.channels, description.crop_pct, description.value_range
