"""Checkpoints and models of a run, in the order of training: the stops of the slider."""

from dataclasses import dataclass
from pathlib import Path

from mae.errors import UserError
from mae.models.description import BEST_FILE, MODEL_FILE
from mae.run_files import CHECKPOINTS
from mae.training.checkpoints.manifest import step_of


@dataclass(frozen=True)
class Stop:
    """One model of a run."""

    name: str
    path: Path
    """What `mae.formats.opening.open_model` opens."""


def stops_of(run: Path) -> list[Stop]:
    """Return all checkpoints of a run by step, then its last model, then its best; of anything else, only itself.

    A checkpoint that is still being written has a name of its own, and is left out.

    Raises:
        UserError: if the folder of the run cannot be read.
    """
    try:
        folder = run / CHECKPOINTS
        steps = sorted((step, path) for path in _entries(folder) if (step := step_of(path)) is not None)
        found = [Stop(f"step {step:,}", path) for step, path in steps]
        models = ((MODEL_FILE, "end of the run"), (BEST_FILE, "best on the evaluation shards"))
        found += [Stop(name, run / file) for file, name in models if (run / file).is_file()]
    except OSError as error:
        raise UserError(f"{run} cannot be read: {error.strerror}; give the folder of a run") from None
    return found or [Stop(run.name or str(run), run)]


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
