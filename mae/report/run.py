"""Report of one run or of several, made from the files of their folders."""

import html
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from mae.files import write_atomically
from mae.report import page
from mae.report.comparison import names_of, results_table, settings_difference
from mae.report.finding import Finding
from mae.report.findings import findings
from mae.report.inspection import IMAGES, Inspection, inspect
from mae.report.page import Section
from mae.report.reading import MODEL_ONLY, PRETRAINING, RunFiles, read_run
from mae.report.surroundings import environment, model_table, settings_section
from mae.report.through_time import MOST_BYTES, through_time
from mae.report.timeline import timeline
from mae.report.training import evaluation_charts, in_words, status, tiles, training_charts
from mae.training.run_folder.ending import FINISHED
from mae.training.run_folder.folder import RunFolder

_IMAGES_AT_THE_END = 200  # the machines of a run are dearer than those on which its report is read
_SIGNS = {"good": "✓", "note": "i", "warning": "!", "problem": "✗"}
_WORDS = {"good": "Good", "note": "Note", "warning": "Warning", "problem": "Problem"}


def report(runs: Sequence[RunFiles], device: torch.device, at_most: int = IMAGES) -> str:
    """Return the report of one run, or of several side by side.

    Args:
        at_most: Most images that the model of a run is shown; 0 leaves out all that needs model or data, which takes
            seconds.
    """
    inspections = [inspect(run, device, at_most) if at_most else Inspection([], None) for run in runs]
    if len(runs) == 1:
        return _of_one(runs[0], inspections[0], device)
    return _of_several(runs, inspections, device)


def write_run_report(folder: RunFolder, device: torch.device, ending: str | None) -> None:
    """Write the report of a run into its folder.

    Args:
        ending: How the run, which writes this at its end, has finished. None: it goes on; then pictures of model and
            data are left out.
    """
    run = read_run(folder.path, is_running=ending is None)
    if ending is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        run = replace(run, ending={"reason": FINISHED, "message": ending, "time": now})
    write_atomically(folder.report, report([run], device, 0 if ending is None else _IMAGES_AT_THE_END).encode())


def run_sections(run: RunFiles) -> list[Section]:
    """Return what the folder of a run tells: curves, evaluations, reconstructions, timeline."""
    sections = [("Training", training_charts([run], [run.name]))]
    if evaluations := evaluation_charts([run], [run.name]):
        title = "Evaluation while pretraining" if run.kind == PRETRAINING else "Accuracy"
        sections.append((title, evaluations))
    if run.kind == PRETRAINING and run.pictures:
        sections.append(("Reconstructions through time", through_time(run.pictures)))
    return sections


def findings_list(found: Sequence[Finding]) -> str:
    """Return the sentences about a run, each with a sign and the word for it."""
    items = "".join(
        f'<li class="{finding.level}"><b role="img" aria-label="{_WORDS[finding.level]}:">{_SIGNS[finding.level]}</b>'
        f"<span>{html.escape(finding.text)}</span></li>"
        for finding in found
    )
    return f'<ul class="findings">{items}</ul>'


def _of_one(run: RunFiles, inspection: Inspection, device: torch.device) -> str:
    word, level = status(run)
    title = f"{in_words(run)}"
    head = (
        f'<p class="lead"><span>{html.escape(title)}</span> <span class="badge {level}">{word}</span></p>{tiles(run)}'
    )
    seen = ("What this page sees", findings_list(findings(run, inspection.neighbours)))
    if run.kind == MODEL_ONLY and run.model is not None:
        here = ("Environment", environment([], [], device))
        return page.page(run.name, [seen, ("Model", model_table(run.model)), here], head)
    sections = [
        seen,
        *run_sections(run),
        *inspection.sections,
        ("Timeline", timeline(run)),
        ("Settings", settings_section(run)),
        ("Environment", environment([run], [run.name], device)),
    ]
    return page.page(run.name, sections, head)


def _of_several(runs: Sequence[RunFiles], inspections: Sequence[Inspection], device: torch.device) -> str:
    names = names_of(runs)
    every = list(zip(runs, names, inspections, strict=True))
    seen = "".join(
        page.subheading(name) + findings_list(findings(run, inspection.neighbours)) for run, name, inspection in every
    )
    sections = [
        ("Results", results_table(runs, names)),
        ("What this page sees", seen),
        ("Training", training_charts(runs, names)),
    ]
    if evaluations := evaluation_charts(runs, names):
        sections.append(("Evaluations", evaluations))
    sections.append(("Settings that differ", settings_difference(runs, names)))
    drawn = [(run, name) for run, name in zip(runs, names, strict=True) if run.pictures]
    if drawn:
        each = [page.subheading(name) + through_time(run.pictures, MOST_BYTES // len(drawn)) for run, name in drawn]
        sections.append(("Reconstructions through time", "".join(each)))
    for title in dict.fromkeys(title for inspection in inspections for title, _ in inspection.sections):
        bodies = [(name, dict(inspection.sections).get(title, "")) for _, name, inspection in every]
        sections.append((title, "".join(page.subheading(name) + body for name, body in bodies if body)))
    sections += [
        ("Timelines", "".join(page.subheading(name) + timeline(run) for run, name, _ in every)),
        ("Settings", "".join(page.details(name, settings_section(run)) for run, name, _ in every)),
        ("Environment", environment(runs, names, device)),
    ]
    return page.page(f"{len(runs)} runs side by side", sections, f'<p class="lead">{html.escape(", ".join(names))}</p>')


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read the folders of some runs.

    Raises:
        UserError: if one holds no run.
    """
    return [read_run(path) for path in paths]
