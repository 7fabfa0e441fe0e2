"""Several runs side by side: their results, and the settings in which they differ."""

from collections.abc import Sequence

from mae.report import page
from mae.report.reading import FINETUNING, PRETRAINING, RunFiles
from mae.report.training import key_figures, status

# Places and what is shown: they differ between runs without any meaning.
_PLACES = ("run_dir",)
_STAGES = (PRETRAINING, FINETUNING)


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return the name of each run's folder, with as many of the folders above as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def results_table(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return the key figures of all runs, one run a row, without columns that no run has."""
    several_stages = len({run.kind for run in runs}) > 1
    found = [key_figures(run) for run in runs]
    shown = [number for number, _ in enumerate(found[0]) if any(figures[number][1] for figures in found)]
    header = ("run", *(["stage"] if several_stages else []), "status", *(found[0][number][0] for number in shown))
    rows = [
        (name, *([run.kind] if several_stages else []), status(run)[0], *(figures[number][1] for number in shown))
        for run, name, figures in zip(runs, names, found, strict=True)
    ]
    note = "Losses of pretraining and of fine-tuning are different quantities: compare them within a stage only."
    return page.table(header, rows) + (page.paragraph(note) if several_stages else "")


def settings_difference(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return the settings that are not the same in all runs, one setting a row; a sentence if there is none."""
    by_stage = {stage: {name for run in runs if run.kind == stage for name in run.settings} for stage in _STAGES}
    known = [names_of_stage for names_of_stage in by_stage.values() if names_of_stage]
    every = dict.fromkeys(name for run in runs for name in run.settings if name not in _PLACES)
    of_one_stage = [name for name in every if not all(name in names_of_stage for names_of_stage in known)]
    for name in of_one_stage:
        del every[name]
    rows = []
    for name in every:
        values = [page.setting(run.settings[name]) if name in run.settings else "(not set)" for run in runs]
        if len(set(values)) > 1:
            rows.append((name, *values))
    alone = f" {len(of_one_stage)} exist only in pretraining or only in fine-tuning." if of_one_stage else ""
    if not rows:
        return page.paragraph(f"All settings are the same.{alone}")
    same = len(every) - len(rows)
    note = f"{same} other settings are the same in all runs.{alone}"
    return page.table(("setting", *names), rows) + page.paragraph(note)
