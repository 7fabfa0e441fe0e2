"""Several runs side by side: their results, and the settings in which they differ."""

from collections.abc import Sequence

from mae.report import page
from mae.report.reading import FINETUNING, PRETRAINING, RunFiles
from mae.report.training import key_figures, status

# Places and what is shown: they differ between runs without any meaning.
_PLACES = ("run_dir",)
_SIDES = ("data.image_size", "model.patch_size")
_NOT_SET = "(not set)"
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
    """Return the settings that are not the same in all runs, one setting a row; a sentence if there is none.

    A setting that only pretraining or only fine-tuning has is compared among the runs of that stage.
    """
    stages = [{name for run in runs if run.kind == stage for name in run.settings} for stage in _STAGES]
    every = dict.fromkeys(name for run in runs for name in run.settings if name not in _PLACES)
    rows, same, alone = [], 0, 0
    for name in every:
        values = [_value(run, name) for run in runs]
        is_of_one_stage = any(stage and name not in stage for stage in stages)
        compared = {value for value in values if value != _NOT_SET} if is_of_one_stage else set(values)
        if len(compared) > 1:
            rows.append((name, *values))
        elif is_of_one_stage:
            alone += 1
        else:
            same += 1
    note = f"{same} {'other ' if rows else ''}settings are the same in all runs."
    note += f" {alone} exist only in pretraining or only in fine-tuning." if alone else ""
    if not rows:
        return page.paragraph(note if alone else "All settings are the same.")
    return page.table(("setting", *names), rows) + page.paragraph(note)


def _value(run: RunFiles, name: str) -> str:
    """Return a setting as text; one side of a square stands for both."""
    if name not in run.settings:
        return _NOT_SET
    value = run.settings[name]
    is_side = name in _SIDES and isinstance(value, list) and len(value) == 1
    return page.setting(value * 2 if is_side else value)
