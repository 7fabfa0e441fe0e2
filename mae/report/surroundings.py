"""Settings and environment of a run: marked and named as the run itself recorded them, where it did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mae import __version__
from mae.errors import UserError
from mae.models.description import DecoderDescription, ModelDescription, read_description
from mae.output import counted
from mae.report import page
from mae.report.reading import FINETUNING, RunFiles
from mae.settings import changed_settings
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.run_folder.history import START


def settings_section(run: RunFiles) -> str:
    """Return the settings that differ from their defaults, and all of them to be opened."""
    if not run.settings:
        return page.paragraph("The settings are lost, or cannot be read.")
    start = _newest_start(run)
    if "changed" in start:
        changed = {name: value for name, value in run.settings.items() if name in start["changed"]}
        what = f"Settings that are not the defaults of {_version(start)}, with which the run was started:"
    else:
        changed = changed_settings(FinetuneSettings if run.kind == FINETUNING else PretrainSettings, run.settings)
        what = (
            f"Settings that are not the defaults of mae {__version__}, which made this page. The run has not recorded "
            "which of them were given, and its version may have had other defaults:"
        )
    return (
        page.paragraph(what)
        + page.settings_table(changed)
        + page.details(f"All {len(run.settings)} settings", page.settings_table(run.settings))
    )


def model_table(path: Path) -> str:
    """Return what the header of a model tells about it; of one that tells nothing, a sentence."""
    try:
        found = read_description(path)
    except (UserError, OSError) as error:
        return page.paragraph(f"The model cannot be described: {error}.")
    sides = [f"{height}x{width}" for height, width in (found.image_size, found.patch_size)]
    decoder = found.decoder
    rows = [
        ("kind", found.kind),
        ("encoder", _in_words(found)),
        ("images", f"{sides[0]} pixels, {counted(found.channels, 'channel')}, patches of {sides[1]}"),
        (
            "mean and std of the pixels",
            "; ".join(" ".join(f"{value:.3f}" for value in values) for values in (found.mean, found.std)),
        ),
        *([("decoder", _in_words(decoder))] if decoder else []),
        *([("classes", ", ".join(found.classes))] if found.classes else []),
    ]
    return page.table(("what", "value"), rows)


def _in_words(of: ModelDescription | DecoderDescription) -> str:
    return f"width {of.width}, {counted(of.depth, 'block')}, {counted(of.heads, 'head')}"


def environment(runs: Sequence[RunFiles], names: Sequence[str], device: torch.device) -> str:
    """Return a table of the machines of the runs' newest starts and of their libraries, and of those of this page."""
    known = [(name, start) for run, name in zip(runs, names, strict=True) if (start := _newest_start(run))]
    here = page.paragraph("This page was made on:") + page.environment_table(device)
    if not known:
        return (page.paragraph("On what the training ran is not recorded.") if runs else "") + here
    libraries = dict.fromkeys(library for _, start in known for library in start.get("libraries", {}))
    rows = [
        ("machine", *(start["host"] for _, start in known)),
        ("device", *(start["where"].removeprefix("device: ") for _, start in known)),
        *((library, *(start.get("libraries", {}).get(library, "") for _, start in known)) for library in libraries),
    ]
    title = page.paragraph("The training ran on (newest start):")
    return title + page.table(("what", *(name for name, _ in known)), rows) + here


def _newest_start(run: RunFiles) -> dict[str, Any]:
    """Return the record of the newest start; empty if there is none."""
    return next((record for record in reversed(run.history) if record["kind"] == START), {})


def _version(start: dict[str, Any]) -> str:
    return f"mae {start['libraries']['mae']}" if "mae" in start.get("libraries", {}) else "the version"
