"""Names of the trackers, and the packages that they need."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from mae.errors import UserError

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]


def require_installed(trackers: Sequence[TrackerName]) -> None:
    """Refuse to begin without the package of a tracker, which is called like the tracker.

    Raises:
        UserError: if one is not installed; Accelerate would silently go without it.
    """
    missing = [name for name in dict.fromkeys(trackers) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"not installed, but among trackers: {', '.join(missing)}; pip install "
            f"'mae-pretraining[{','.join(missing)}]', or leave them out (metrics.jsonl is always written)"
        )
