"""Application of a model to all images that a user names, with one row per image."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from mae.errors import BadDataError, first_of
from mae.formats.opening import open_model
from mae.inference.image_set import ImageSet
from mae.inference.model import Model, load_stored
from mae.inference.parts import Part, compute_parts
from mae.inference.rows import Rows
from mae.inference.settings import ApplySettings
from mae.inference.sources import open_images
from mae.inference.table import Table, write_table
from mae.output import say as print_line
from mae.processes import is_started_by_launcher
from mae.versions import library_versions


@dataclass(frozen=True)
class Application:
    """Model, and the images to apply it to."""

    model: Model
    images: ImageSet
    accelerator: Accelerator
    workers: int
    say: Callable[[str], None]
    """Function that prints a line, on the first process only."""

    @classmethod
    def open(cls, settings: ApplySettings, accelerator: Accelerator, needs_head: bool = False) -> "Application":
        """Load the model, and find the images.

        Raises:
            UserError: if there is no model, it lacks a head that it needs, or a source has no images.
        """
        say = print_line if accelerator.is_main_process else lambda text: None
        stored = open_model(settings.model, settings.normalization, settings.heads, best=True)
        model = load_stored(stored, accelerator.device)
        if needs_head:
            model.require_head()
        images = open_images(settings.source, settings.as_seen_by(model.description), say)
        return cls(model, images, accelerator, settings.workers, say)

    def write(self, rows: Rows, out: Path) -> None:
        """Write a table with one row per image. Collective.

        Raises:
            UserError: if `out` is there already, or has an unknown format.
            BadDataError: after the table is written, if images could not be used. Under a launcher they are only
                reported, because it would turn the exit code into a traceback.
        """
        facts = {"model": self.model.sha256, "images": self.images.fingerprint, "versions": library_versions()}
        table = Table(out, rows.schema, facts | rows.choices)
        table.check()
        self.say(self._which_model())
        began = time.monotonic()
        bad = write_table(table, self.images, partial(self._compute, rows), rows, self.accelerator, self.say)
        if not self.accelerator.is_main_process:
            return
        speed = len(self.images) / max(time.monotonic() - began, 1e-9)
        summary = f"{out}: {len(self.images):,} images, {speed:,.0f} images/s"
        if not bad:
            print_line(summary, is_result=True)
            return
        problem = f"{summary}; {len(bad)} of them could not be used, and their rows say why: {first_of(bad, most=2)}"
        if not is_started_by_launcher():
            raise BadDataError(problem)
        self.say(f"warning: {problem}")

    def _compute(self, rows: Rows, parts: Sequence[range]) -> Iterator[Part]:
        return compute_parts(self.images, parts, self.model.description, rows.compute, self.workers, rows.extra)

    def _which_model(self) -> str:
        """Return which file is used and, for the best model of a run, on which samples it was chosen."""
        path, chosen = self.model.path, self.model.selection
        if chosen is None:
            return f"model {path}{self.model.stored.summary if self.model.stored else ''}"
        how = f"accuracy {chosen.accuracy:.2%} after step {chosen.step:,} on its evaluation samples"
        these = ", which are these" if self.images.fingerprint == chosen.fingerprint else ""
        return f"model {path}, the best of its run: {how}{these}"
