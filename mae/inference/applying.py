"""Application of a model to all images that a user names, with one row per image."""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from mae.errors import BadDataError, first_of
from mae.files import open_regular
from mae.inference.image_set import ImageSet
from mae.inference.model import Model
from mae.inference.parts import compute_parts
from mae.inference.rows import Rows
from mae.inference.table import Table, write_table
from mae.processes import is_started_by_launcher
from mae.versions import library_versions


def describe_model(model: Model, images: ImageSet) -> str:
    """Return which file is used and, for the best model of a run, on which samples it was chosen."""
    chosen = model.selection
    if chosen is None:
        return f"model {model.path}"
    how = f"the best of its run: accuracy {chosen.accuracy:.2%} after step {chosen.step:,} on its evaluation samples"
    return f"model {model.path}, {how}" + (", which are these" if images.fingerprint == chosen.fingerprint else "")


def apply_model(
    model: Model,
    images: ImageSet,
    function: Callable[[Tensor], Tensor],
    rows: Rows,
    out: Path,
    asked: Mapping[str, Any],
    accelerator: Accelerator,
    workers: int,
    say: Callable[[str], None],
) -> None:
    """Write a table with one row per image, from what `function` gives for batches of views. Collective.

    `asked` are the settings that decide the rows.

    Raises:
        UserError: if `out` is there already, or has an unknown format.
        BadDataError: after the table is written, if images could not be used. Under a launcher they are only reported,
            because it would turn the exit code into a traceback.
    """
    with open_regular(model.path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"model": sha256, "images": images.fingerprint, "versions": library_versions()}
    table = Table(out, rows.schema, facts | dict(asked))
    table.check()
    say(describe_model(model, images))
    compute = partial(compute_parts, images, description=model.description, function=function, workers=workers)
    began = time.monotonic()
    bad = write_table(table, images, compute, rows, accelerator, say)
    if not accelerator.is_main_process:
        return
    speed = len(images) / max(time.monotonic() - began, 1e-9)
    summary = f"{out}: {len(images):,} images, {speed:,.0f} images/s"
    if not bad:
        say(summary)
        return
    problem = f"{summary}; {len(bad)} of them could not be used, and their rows say why: {first_of(bad, most=2)}"
    if not is_started_by_launcher():
        raise BadDataError(problem)
    say(f"warning: {problem}")
