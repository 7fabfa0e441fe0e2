"""Export of one model to one or several targets: checked, written aside, loaded back, compared, published."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mae.errors import UserError, first_of
from mae.export.card import write_card
from mae.export.left_behind import describe_left_behind
from mae.export.publish import CARD_FILE, new_folder, require_free
from mae.export.target import Target
from mae.export.targets import ALL, TARGETS
from mae.export.trained_model import TrainedModel
from mae.export.verification import verify
from mae.progress import working


@dataclass(frozen=True)
class Exported:
    """Finished export."""

    target: str
    folder: Path
    seconds: float
    left_behind: Sequence[str]
    """Names of the model's tensors that the folder does not hold."""
    greatest_difference: float
    """Greatest difference of an output, as a share of the greatest absolute value of that output."""


def export_model(
    model: TrainedModel, to: Sequence[str], out: Path | None, say: Callable[[str], None]
) -> list[Exported]:
    """Export a model; every target is checked before the first is written.

    Args:
        model: Model to export.
        to: Names of targets, or `all` for those that can hold the model and whose packages are installed.
        out: New folder: of one target the export itself, of several the folder of one folder for each target. None:
            `export-TARGET` beside the model; see `mae.formats.opening.StoredModel.beside`.
        say: Prints one line.

    Raises:
        UserError: if a target cannot hold the model, a package is missing, a folder is in use, or an output of the
            loaded export differs by more than its target allows.
    """
    targets = choose_targets(model, to, say)
    folders = [_folder(target, model, out, is_alone=ALL not in to and len(targets) == 1) for target in targets]
    for folder in folders:
        require_free(folder)
    return [_export(target, model, folder, say) for target, folder in zip(targets, folders, strict=True)]


def choose_targets(
    model: TrainedModel, to: Sequence[str], say: Callable[[str], None], setting: str = "to"
) -> list[Target]:
    """Return the targets of these names, which the setting of that name gives.

    Raises:
        UserError: if there is no name, one is unknown, or a target that is named cannot be written.
    """
    if not to:
        raise UserError(f"{setting} names no target; allowed: {', '.join([*TARGETS, ALL])}")
    if unknown := [name for name in to if name not in (*TARGETS, ALL)]:
        raise UserError(f"{setting} is {first_of(unknown)}; allowed: {', '.join([*TARGETS, ALL])}")
    chosen = []
    for name, target in TARGETS.items():
        problem = _problem(target, model) if name in to or ALL in to else None
        if problem is not None and name in to:
            raise UserError(problem)
        if problem is not None:
            say(f"left out: {problem}")
        elif name in to or ALL in to:
            chosen.append(target)
    return chosen


def _problem(target: Target, model: TrainedModel) -> str | None:
    """Return why a target cannot be written; None if it can."""
    if refusal := target.refusal(model):
        return f"{target.name} cannot hold {model.path}: {refusal}"
    try:
        target.require_packages()
    except UserError as error:
        return str(error)
    return None


def _folder(target: Target, model: TrainedModel, out: Path | None, is_alone: bool) -> Path:
    if out is None:
        return model.beside(f"export-{target.name}")
    return out if is_alone else out / target.name


def _export(target: Target, model: TrainedModel, folder: Path, say: Callable[[str], None]) -> Exported:
    began, place = time.monotonic(), folder.absolute()  # the current folder may be replaced
    with working(f"writing for {target.library} and comparing"), new_folder(folder) as part:
        target.write(model, part)
        differences = verify(target, model, part)
        write_card(target, model, part)
        card = (part / CARD_FILE).read_bytes()
    greatest = max((each.greatest / each.scale for each in differences if each.scale), default=0.0)
    exported = Exported(target.name, folder, time.monotonic() - began, target.left_behind(model), greatest)
    say(
        f"exported {model.path} to {folder} for {target.library} in {exported.seconds:.1f} s; loaded back, its outputs "
        f"differ by at most {greatest:.1e} of the greatest value"
    )
    if (place / CARD_FILE).read_bytes() != card:
        say(f"  {folder / CARD_FILE} is another than was written now, and stays; remove it to have it written anew")
    if exported.left_behind:
        say(f"  left behind: {describe_left_behind(model, exported.left_behind)}")
    return exported
