"""Files of an evaluation: `results.json`, and the same rows as tables in Markdown and HTML."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae.evaluation.results import HEADER, Row, cells, markdown
from mae.files import write_atomically
from mae.report import page

NOTES = (
    "Figures in percent; ± is the sample deviation over seeds, and for few_shot over the choices of samples.",
    "Tokens, norm, k, C and learning rates were chosen on a tenth of the training samples (about 2,000 at most, but "
    "one of each class at least), held out for that; the test samples were used once.",
    "pixels and untrained show what the protocols give without pretraining.",
)


_UNFINISHED = "This evaluation is unfinished: other rows were to follow. To have them all, run the same command again."


def write_evaluation(out: Path, rows: Sequence[Row], about: dict[str, Any], is_finished: bool = True) -> None:
    """Write `results.json`, `results.md` and `results.html` into the folder `out`.

    Rows of an evaluation that goes on for hours are written as they appear; if not `is_finished`, the files say so.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | {"finished": is_finished, "rows": [row.to_json() for row in rows]}, indent=1)
    write_atomically(out / "results.json", text.encode())
    facts = [f"{name}: {value}" for name, value in _facts(about)]
    notes = NOTES if is_finished else (_UNFINISHED, *NOTES)
    lines = "".join(f"- {line}\n" for line in (*facts, *notes))
    write_atomically(out / "results.md", f"# Evaluation\n\n{markdown(rows)}\n{lines}".encode("utf-8", "replace"))
    sections = [
        ("Results", page.table(HEADER, map(cells, rows)) + "".join(map(page.paragraph, notes))),
        *((f"{row.encoder}, {row.protocol}", _classes(row, about["classes"])) for row in rows),
        ("How it was measured", page.table(("what", "value"), _facts(about))),
    ]
    write_atomically(out / "results.html", page.page("Evaluation", sections).encode())


def _facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("command", about["command"]),
        ("training samples", _samples(about["train"])),
        ("test samples", _samples(about["test"])),
        ("images per second", ", ".join(f"{name}: {_speed(found)}" for name, found in about["speed"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
    ]


def _speed(found: dict[str, Any] | None) -> str:
    return "not known" if found is None else f"{found['images_per_second']:,.0f}"


def _samples(of: dict[str, Any]) -> str:
    return f"{of['samples']:,} of {' '.join(of['shards'])} (fingerprint {of['fingerprint'][:12]})"


def _classes(row: Row, names: Sequence[str]) -> str:
    """Return the accuracy of each class, and for few classes how they are taken for each other."""
    accuracies = ["" if value is None else f"{100 * value:.1f}" for value in row.per_class]
    if row.confusion is None:
        return page.table(("class", "accuracy"), zip(names, accuracies, strict=True))
    lines = [(name, accuracy, *counts) for name, accuracy, counts in zip(names, accuracies, row.confusion, strict=True)]
    return page.table(("class", "accuracy", *(f"as {name}" for name in names)), lines)
