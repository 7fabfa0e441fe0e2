"""Trackers of Accelerate behind one interface, with what Accelerate lacks: pictures, resumes, and what they hold."""

import os
import re
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from mae.errors import UserError
from mae.training.trackers.events import PICTURES, Event
from mae.training.trackers.settings import TrackerName

# Name of a picture's file in MLflow, and its step; earlier versions had percent signs.
_MLFLOW_PICTURE = re.compile(r"images/(.+?)[+%]step[+%](\d+)[+%]")
# Seconds that trackio may take to write what it was given.
_TRACKIO_TIMEOUT = 30.0


class Adapter:
    """One run in a tracker. All calls come from one thread: some trackers know the run of their own thread only."""

    name: ClassVar[TrackerName]
    takes_settings_again: ClassVar[bool] = False
    """Whether the settings are given in every session, which replaces those of before, or only once."""

    def __init__(self, folder: Path, project: str, run: str) -> None:
        """Open `run` again, by its name or id; empty: begin a new one. It is shown under the name of the run folder."""
        self._title, self._project = folder.resolve().name, project
        self.run = run or f"{self._title}-{os.urandom(4).hex()}"
        """Name or id by which `run` is found again."""
        self._tracker = self._made(folder)
        self._tracker.start()
        self._started()

    def _made(self, folder: Path) -> Any:
        return self._of_accelerate(self._project)

    def _of_accelerate(self, *words: str, **options: Any) -> Any:
        return LOGGER_TYPE_TO_CLASS[self.name](*words, **options)

    def _started(self) -> None:
        """Prepare a run that was begun or resumed."""

    def store_settings(self, settings: Mapping[str, Any]) -> None:
        """Store the settings of the run, each as a number or as text."""
        self._tracker.store_init_configuration(
            {name: value if isinstance(value, bool | int | float) else str(value) for name, value in settings.items()}
        )

    def give(self, event: Event) -> None:
        """Hand over one event."""
        if event.numbers:
            self._log(dict(event.numbers), event.step)
        if event.picture is not None:
            with Image.open(event.picture) as picture:
                self._log_picture(picture.convert("RGB"), event.step)

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._tracker.log(numbers, step=step)

    def _log_picture(self, picture: Image.Image, step: int) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Return once what was given cannot be lost when this process is killed."""

    def held(self) -> set[tuple[str, int]]:
        """Return names and steps of what the run in the tracker holds; empty if it cannot be asked."""
        return set()

    def finish(self) -> None:
        """End the session; the run can be opened again."""
        self._tracker.finish()


class _TensorBoard(Adapter):
    """Event files in `tensorboard` in the run folder, which TensorBoard reads as one run."""

    name = "tensorboard"

    def _made(self, folder: Path) -> Any:
        return self._of_accelerate("tensorboard", str(folder))

    def _log_picture(self, picture: Image.Image, step: int) -> None:
        self._tracker.log_images({PICTURES: np.asarray(picture)[np.newaxis]}, step=step, dataformats="NHWC")

    def flush(self) -> None:
        self._tracker.tracker.flush()

    def held(self) -> set[tuple[str, int]]:
        loader = import_module("tensorboard.backend.event_processing.event_file_loader").EventFileLoader
        files = sorted(Path(self._tracker.logging_dir).glob("events.out.tfevents.*"))
        events = (event for file in files for event in loader(str(file)).Load())
        # A single picture of `add_images` gets the number 0.
        return {(value.tag.removesuffix("/0"), event.step) for event in events for value in event.summary.value}


class _Trackio(Adapter):
    """Run in a local store of trackio (`TRACKIO_DIR`), or in a Space or on a server that its own variables name."""

    name = "trackio"
    takes_settings_again = True

    def _made(self, folder: Path) -> Any:
        return self._of_accelerate(self._project, name=self.run, resume="allow", embed=False)

    def _started(self) -> None:
        self._is_local = not any(os.environ.get(f"TRACKIO_{word}") for word in ("SPACE_ID", "SERVER_URL"))
        self._store = import_module("trackio.sqlite_storage").SQLiteStorage
        self._expected = self._count()

    def _count(self) -> int:
        return int(self._store.get_log_count(self._project, self.run)) if self._is_local else 0

    def _log(self, numbers: dict[str, Any], step: int) -> None:
        self._tracker.log(numbers, step=step)
        self._expected += 1

    def _log_picture(self, picture: Image.Image, step: int) -> None:
        self._log({PICTURES: import_module("trackio").Image(picture)}, step)

    def flush(self) -> None:
        deadline = time.monotonic() + _TRACKIO_TIMEOUT
        while self._is_local and self._count() < self._expected:
            if time.monotonic() > deadline:
                raise UserError(f"trackio has not written to its store for {_TRACKIO_TIMEOUT:.0f} s")
            time.sleep(0.05)

    def held(self) -> set[tuple[str, int]]:
        logs = self._store.get_logs(self._project, self.run) if self._is_local else []
        return {(name, log["step"]) for log in logs for name in log}


class _WandB(Adapter):
    """Run of Weights & Biases, online or offline (`WANDB_MODE=offline`).

    It drops steps below the newest, so the step is a figure of its own, over which all others are drawn.
    """

    name = "wandb"
    takes_settings_again = True

    def _made(self, folder: Path) -> Any:
        settings = import_module("wandb").Settings(console="off")
        return self._of_accelerate(
            self._project, id=self.run, name=self._title, resume="allow", dir=str(folder), settings=settings
        )

    def _started(self) -> None:
        self._tracker.tracker.define_metric("step")
        self._tracker.tracker.define_metric("*", step_metric="step")

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._tracker.log({**numbers, "step": step})

    def _log_picture(self, picture: Image.Image, step: int) -> None:
        self._tracker.log_images({PICTURES: [picture]}, commit=False)
        self._tracker.log({"step": step})


class _MLflow(Adapter):
    """Run of MLflow, in the store that `MLFLOW_TRACKING_URI` names."""

    name = "mlflow"

    def __init__(self, folder: Path, project: str, run: str) -> None:
        self._known = run or None
        super().__init__(folder, project, run)

    def _made(self, folder: Path) -> Any:
        return self._of_accelerate(self._project, run_id=self._known, run_name=self._title)

    def _started(self) -> None:
        self.run = self._tracker.tracker.info.run_id
        self._client = import_module("mlflow").MlflowClient()

    def _log_picture(self, picture: Image.Image, step: int) -> None:
        self._client.log_image(self.run, picture, key=PICTURES, step=step)

    def held(self) -> set[tuple[str, int]]:
        names = self._client.get_run(self.run).data.metrics
        numbers = {(name, metric.step) for name in names for metric in self._client.get_metric_history(self.run, name)}
        files = [_MLFLOW_PICTURE.match(file.path) for file in self._client.list_artifacts(self.run, "images")]
        return numbers | {(found[1], int(found[2])) for found in files if found}


ADAPTERS: dict[TrackerName, type[Adapter]] = {
    adapter.name: adapter for adapter in (_TensorBoard, _Trackio, _WandB, _MLflow)
}
