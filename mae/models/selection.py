"""Selection of the best model of a run, in the header of its file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mae.errors import UserError
from mae.models.description import read_metadata

_FIELD = "mae_selection"


@dataclass(frozen=True)
class Selection:
    """Reason why a model was kept as the best of its run."""

    fingerprint: str
    """Fingerprint of the evaluation samples; a result on the same samples is too good, because they chose the model."""
    step: int
    """Number of steps after which the model was measured."""
    accuracy: float
    """Accuracy on these samples, from 0 to 1."""

    def metadata(self) -> dict[str, str]:
        """Return the metadata for the header of a safetensors file, beside those of `ModelDescription`."""
        return {_FIELD: json.dumps(asdict(self))}


def read_selection(path: Path) -> Selection | None:
    """Read why a model was kept as the best of its run; None if it was not, or the file does not say.

    Raises:
        UserError: if the file is missing or damaged.
    """
    text = read_metadata(path).get(_FIELD)
    if text is None:
        return None
    try:
        found = json.loads(text)
        return Selection(str(found["fingerprint"]), int(found["step"]), float(found["accuracy"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"model file {path} describes its selection in a way this version of mae does not know"
        ) from None
