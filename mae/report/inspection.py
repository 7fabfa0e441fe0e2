"""Look at the model of a run and at its data: the parts of a report that need more than the log."""

from typing import NamedTuple

import torch

from mae.errors import UserError
from mae.inference.model import Model, load
from mae.report import page
from mae.report.class_results import class_tables, confusion_of, mistakes, read_evaluation
from mae.report.data_card import data_card
from mae.report.finding import NearestNeighbours
from mae.report.model_pictures import (
    Seen,
    attention_and_colors,
    compare_with_pixels,
    neighbours,
    reconstructions,
    see,
)
from mae.report.page import Section
from mae.report.reading import RunFiles
from mae.report.run_images import RunImages, held_out_patterns, open_images
from mae.run_files import CHECKPOINTS
from mae.training.checkpoints.manifest import step_folder

IMAGES = 600
"""Most images that a model is shown for a report."""


class Inspection(NamedTuple):
    """Sections about model and data, and what was found on the way."""

    sections: list[Section]
    neighbours: NearestNeighbours | None


def inspect(run: RunFiles, device: torch.device, at_most: int = IMAGES) -> Inspection:
    """Look at the data of a run, and let its model see some images; what is not there is left out with a sentence."""
    evaluated = read_evaluation(run.path, run.model)
    sections, nearest = list[Section](), evaluated.neighbours
    confusion = evaluated.confusion
    try:
        model, images = _model(run, device), _images(run)
        seen = see(model, images, at_most)
        sections.append(("What the model sees", _pictures(model, seen)))
        nearest = nearest or compare_with_pixels(seen)
        if model.has_head:
            confusion = confusion or confusion_of(seen, model.classes)
            tables = class_tables(confusion) if confusion is not None else ""
            if body := tables + mistakes(seen, model.classes):
                sections.append(("Classes", body))
    except (UserError, OSError) as error:
        sections.append(("What the model sees", page.paragraph(f"Pictures from the model are left out: {error}.")))
        if confusion is not None:
            sections.append(("Classes", class_tables(confusion)))
    sections.append(("Data", data_card(run)))
    return Inspection(sections, nearest)


def _model(run: RunFiles, device: torch.device) -> Model:
    """Load the best model, else the last, else that of the newest checkpoint."""
    if run.model is not None:
        return load(run.model, device)
    if not run.checkpoints:
        raise UserError("neither a model nor a checkpoint is in the folder of the run")
    return load(step_folder(run.path / CHECKPOINTS, run.checkpoints[-1]), device)


def _images(run: RunFiles) -> RunImages:
    return open_images(run, held_out_patterns(run) or run.texts("data.shards"))


def _pictures(model: Model, seen: Seen) -> str:
    parts = [
        page.subheading("Features of the patches, and where the cls token looks"),
        page.paragraph(
            "Patches of the same colour have similar features (their first three principal components, over all these "
            "images). Attention is that of the last block; bright patches count most."
        ),
        attention_and_colors(model, seen),
    ]
    if filled := reconstructions(model, seen):
        parts += [
            page.subheading("The same images under the same masks"),
            page.paragraph("The more is hidden, the more the model has to guess."),
            filled,
        ]
    parts += [
        page.subheading("Nearest neighbours"),
        page.paragraph(
            f"The most similar of {len(seen.ids):,} images, by the cosine of their features (cls token and mean of the "
            "patches, before the last norm). Where classes are known, green frames have the same class, red ones "
            "another."
        ),
        neighbours(seen),
    ]
    return "".join(parts)
