"""How a classifier does for each class: accuracies, which classes it takes for which, its most confident mistakes."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mae.evaluation.judging import HEAD
from mae.files import read_bounded
from mae.report import page
from mae.report.charts import percent
from mae.report.finding import NearestNeighbours
from mae.report.images import Tile, displayable, embedded, grid
from mae.report.model_pictures import Seen
from mae.training.checkpoints.manifest import MALFORMED, FileIdentity

RESULTS = Path("evaluation") / "results.json"
"""Where `mae evaluate` writes its results, in the folder of the run."""
_MOST_BYTES = 1 << 26
_MOST_OF_MATRIX, _MOST_CONFUSIONS, _MISTAKES = 24, 20, 14


class Confusion(NamedTuple):
    """How often each class was taken for each class."""

    names: list[str]
    counts: NDArray[np.int64]
    """Samples of each class (row) that were taken for each class (column)."""
    source: str
    """Where the figures are from, in words."""


class Evaluated(NamedTuple):
    """Part of the results of `mae evaluate` that a report shows."""

    confusion: Confusion | None
    """Of the classifier's own head."""
    neighbours: NearestNeighbours | None


def read_evaluation(run_dir: Path, model: Path | None) -> Evaluated:
    """Return what `mae evaluate` has found about the model file of the run; nothing if there are no such results.

    A folder may hold the results of an earlier model, and those of other runs that were judged with it.
    """
    if model is None or not (run_dir / RESULTS).is_file():
        return Evaluated(None, None)
    try:
        found = json.loads(read_bounded(run_dir / RESULTS, _MOST_BYTES))
        names, rows = list(map(str, found["classes"])), list(found["rows"])
        samples = int(float(found["test"]["samples"]))
        sha256 = FileIdentity.of(model).sha256
        own = [row for row in rows if row["about"].get("sha256") == sha256]
        head = next((row for row in own if row["protocol"] == HEAD and row["confusion"]), None)
        confusion = None
        if head is not None:
            counts = np.array(head["confusion"], dtype=np.int64)
            if counts.shape == (len(names), len(names)) and counts.min() >= 0:
                confusion = Confusion(names, counts, f"{counts.sum():,} test images (mae evaluate)")
        pixels = [row for row in rows if row["encoder"].startswith("pixels ")]
        return Evaluated(confusion, _nearest(_knn(own), _knn(pixels), samples))
    except (OSError, ValueError, *MALFORMED):
        return Evaluated(None, None)


def _knn(rows: Sequence[dict[str, Any]]) -> float | None:
    return next((float(row["top1"]["mean"]) for row in rows if row["protocol"] == "knn"), None)


def _nearest(own: float | None, pixels: float | None, samples: int) -> NearestNeighbours | None:
    if own is None or pixels is None or samples < 1:
        return None
    return NearestNeighbours(own, pixels, samples, "mae evaluate")


def confusion_of(seen: Seen, names: Sequence[str]) -> Confusion | None:
    """Count the predictions for the images that the model has seen; None without labels."""
    known = [name for name in seen.classes if name in set(names)]
    if seen.logits is None or len(known) < len(seen.classes):
        return None
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    place = {name: at for at, name in enumerate(names)}
    for name, predicted in zip(seen.classes, seen.logits.argmax(dim=1).tolist(), strict=True):
        counts[place[name], predicted] += 1
    return Confusion(list(names), counts, f"{len(known):,} validation images")


def class_tables(found: Confusion) -> str:
    """Return accuracy and commonest mistake of each class, and the matrix; of many classes, the commonest mistakes."""
    totals, right = found.counts.sum(axis=1), np.diag(found.counts)
    share = right.sum() / max(int(totals.sum()), 1)
    text = page.paragraph(f"{percent(float(share))} of {found.source} are classified correctly.")
    wrong = found.counts - np.diag(right)
    rows = []
    for at in np.argsort(right / np.maximum(totals, 1), kind="stable").tolist():
        accuracy = right[at] / totals[at] if totals[at] else None
        bar = (
            ""
            if accuracy is None
            else f'<span class="bar" style="width:{8 * accuracy:.2f}rem"></span> {percent(accuracy)}'
        )
        most = int(wrong[at].argmax())
        mistake = f"{found.names[most]} ({wrong[at, most]:,})" if wrong[at, most] else ""
        rows.append(
            f"<tr><td>{html.escape(found.names[at])}</td><td class='number'>{totals[at]:,}</td><td>{bar}</td>"
            f"<td>{html.escape(mistake)}</td></tr>"
        )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("class", "images", "accuracy", "most often taken for"))
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    many = len(found.names) > _MOST_OF_MATRIX
    text += page.details(f"All {len(rows)} classes", table) if many else table
    return (
        text
        + page.subheading("Which class is taken for which")
        + (_commonest(found, wrong) if many else _matrix(found))
    )


def mistakes(seen: Seen, names: Sequence[str]) -> str:
    """Return the pictures that were taken for another class with the greatest probability."""
    if seen.logits is None:
        return ""
    probabilities, predicted = torch.softmax(seen.logits.double(), dim=1).max(dim=1)
    wrong = [
        at
        for at, label in enumerate(predicted.tolist())
        if seen.classes[at] in names and names[label] != seen.classes[at]
    ]
    worst = sorted(wrong, key=lambda at: -float(probabilities[at]))[:_MISTAKES]
    if not worst:
        return page.paragraph(f"None of {len(seen.ids):,} validation images looked at was taken for another class.")
    tiles = [
        Tile(
            embedded(displayable(seen.views[at])),
            seen.names[at],
            f"{seen.classes[at]}, taken for {names[int(predicted[at])]} ({percent(float(probabilities[at]))})",
        )
        for at in worst
    ]
    rows = [tiles[at : at + _MISTAKES // 2] for at in range(0, len(tiles), _MISTAKES // 2)]
    return page.subheading("Most confident mistakes") + grid((), rows)


def _matrix(found: Confusion) -> str:
    """Return the matrix as a table, darker for greater shares of a row."""
    totals = np.maximum(found.counts.sum(axis=1), 1)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in found.names)
    rows = []
    for at, name in enumerate(found.names):
        cells = []
        for to, count in enumerate(found.counts[at].tolist()):
            share = 100 * count / totals[at]
            color = "--good" if to == at else "--problem"
            cells.append(
                f'<td style="background:color-mix(in srgb,var({color}) {0.75 * share:.0f}%,transparent)">'
                f"{count if count else ''}</td>"
            )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>')
    note = page.paragraph("Rows: the class of the image. Columns: what it was taken for.")
    body = f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'{note}<div class="scroll">{body}</div>'


def _commonest(found: Confusion, wrong: NDArray[np.int64]) -> str:
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    places = [divmod(int(at), len(found.names)) for at in order]
    rows = [(found.names[a], found.names[b], f"{wrong[a, b]:,}") for a, b in places if wrong[a, b]]
    return page.table(("class", "taken for", "images"), rows)
