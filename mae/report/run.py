"""Report of one run or of several, made from the files of their folders."""

import html
from collections.abc import Sequence
from pathlib import Path

import torch

from mae.files import write_atomically
from mae.report import page
from mae.report.comparison import names_of, results_table, settings_difference
from mae.report.findings import Finding, findings
from mae.report.page import Section
from mae.report.run_files import PRETRAINING, RunFiles, read_run
from mae.report.through_time import MOST_BYTES, through_time
from mae.report.timeline import timeline
from mae.report.training import evaluation_charts, in_words, status, tiles, training_charts
from mae.training.run_folder.folder import RunFolder

_SIGNS = {"good": "✓", "note": "i", "warning": "!", "problem": "✗"}
_WORDS = {"good": "Good", "note": "Note", "warning": "Warning", "problem": "Problem"}


def report(runs: Sequence[RunFiles], device: torch.device) -> str:
    """Return the report of one run, or of several side by side."""
    return _of_one(runs[0], device) if len(runs) == 1 else _of_several(runs, device)


def write_run_report(folder: RunFolder, device: torch.device, is_running: bool = False) -> None:
    """Write the report of a run into its folder."""
    write_atomically(folder.report, report([read_run(folder.path, is_running)], device).encode())


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


def _of_one(run: RunFiles, device: torch.device) -> str:
    word, level = status(run)
    title = f"{in_words(run)}"
    head = (
        f'<p class="lead"><span>{html.escape(title)}</span> <span class="badge {level}">{word}</span></p>{tiles(run)}'
    )
    sections = [
        ("What this page sees", findings_list(findings(run))),
        *run_sections(run),
        ("Timeline", timeline(run)),
        ("Settings", _settings(run)),
        ("Environment", page.paragraph("This page was made on:") + page.environment_table(device)),
    ]
    return page.page(run.name, sections, head)


def _of_several(runs: Sequence[RunFiles], device: torch.device) -> str:
    names = names_of(runs)
    seen = "".join(page.subheading(name) + findings_list(findings(run)) for run, name in zip(runs, names, strict=True))
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
    sections.append(("Timelines", "".join(page.subheading(n) + timeline(r) for r, n in zip(runs, names, strict=True))))
    every = [page.details(name, _settings(run)) for run, name in zip(runs, names, strict=True)]
    sections.append(("Settings", "".join(every)))
    sections.append(("Environment", page.paragraph("This page was made on:") + page.environment_table(device)))
    return page.page(f"{len(runs)} runs side by side", sections, f'<p class="lead">{html.escape(", ".join(names))}</p>')


def _settings(run: RunFiles) -> str:
    if not run.settings:
        return page.paragraph("The settings are lost, or cannot be read.")
    return page.settings_table(run.settings)


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read the folders of some runs.

    Raises:
        UserError: if one holds no run.
    """
    return [read_run(path) for path in paths]
