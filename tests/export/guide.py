"""Tables of docs/export.md, made from what the targets say of themselves.

`PYTHONPATH=tests python -m export.guide` writes them into the guide.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from export.models import RECTANGLE, SQUARE, autoencoder, classifier, export
from mae.export.publish import CARD_FILE, PICTURE_FILE, VERIFICATION_FILE
from mae.export.table import safe, table
from mae.export.target import Target
from mae.export.targets import TARGETS
from mae.export.trained_model import TrainedModel
from mae.models.classifier import HeadKind
from mae.models.vit import TokenKind

GUIDE = Path(__file__).parents[2] / "docs" / "export.md"
COMMAND = "PYTHONPATH=tests python -m export.guide"
POOLS: tuple[TokenKind, ...] = ("cls", "avg", "cls+avg")
HEADS: tuple[HeadKind, ...] = ("linear", "mlp")
_OF_ALL = {CARD_FILE, PICTURE_FILE, VERIFICATION_FILE}


def cases() -> Iterator[tuple[str, str, TrainedModel]]:
    """Yield pool, the rest of the description, and the model, of every kind that the guide tells apart."""
    yield "cls", "decoder (a pretraining run)", autoencoder(SQUARE, (8, 8), 3)
    for pool in POOLS:
        yield pool, "none", encoder_of(classifier("linear", pool))
        for head in HEADS:
            yield pool, f"{head} head", classifier(head, pool)
    yield "cls", "linear head, 1 channel", classifier("linear", channels=1)
    yield "cls", "linear head, 5 channels", classifier("linear", channels=5)
    yield "cls", "linear head, not square", classifier("linear", "cls", RECTANGLE, (8, 12))


def encoder_of(model: TrainedModel) -> TrainedModel:
    return replace(model, weights={name: model.weights[name] for name in model.weights if name not in model.head_names})


def holds(target: Target, model: TrainedModel) -> str:
    """What of the model an export holds."""
    if target.refusal(model) is not None:
        return "refused"
    left = target.left_behind(model)
    missing = [part for part, names in parts(model).items() if set(names) & set(left)]
    return f"no {' or '.join(missing)}" if missing else "all"


def parts(model: TrainedModel) -> dict[str, Sequence[str]]:
    return {"decoder": model.decoder_names, "head": model.head_names}


def holdings() -> str:
    rows = [[pool, rest, *(holds(target, model) for target in TARGETS.values())] for pool, rest, model in cases()]
    return table(rows, ("pool", "beside the encoder", *(f"`{name}`" for name in TARGETS)))


def refusals() -> str:
    """Why targets refuse models, each reason once."""
    found: dict[tuple[str, str], None] = {}
    for _, _, model in cases():
        for name, target in TARGETS.items():
            if (reason := target.refusal(model)) is not None:
                found[name, reason] = None
    return "\n".join(f"- `{name}`: {safe(reason)}" for name, reason in found)


def targets(files: Mapping[str, str]) -> str:
    """Table of all targets; `files` of each."""
    rows = [
        [
            f"`{name}`",
            target.library,
            files.get(name, ""),
            _kept(target),
            f"{target.tolerance:g}",
            f"`{target.extra}`: {', '.join(target.requires)}" if target.requires else "",
        ]
        for name, target in TARGETS.items()
    ]
    return table(rows, ("`--to`", "loaded by", "files", "holds", "tolerance", "extra to install"))


def _kept(target: Target) -> str:
    """The parts that a target holds of any model."""
    models = [model for _, _, model in cases() if target.refusal(model) is None]
    kept = {"encoder": None}
    for model in models:
        left = target.left_behind(model)
        named = {"decoder": "decoder", "head": f"{model.head} head"}
        kept |= {named[part]: None for part, names in parts(model).items() if names and not set(names) & set(left)}
    return ", ".join(kept)


def files_of(target: str) -> str:
    """Names of the files that a target writes, beside those of all targets."""
    names: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for number, (_, _, model) in enumerate(cases()):
            if TARGETS[target].refusal(model) is None and number in (0, 2, 3):
                names |= files_in(export(model, target, Path(folder) / str(number)).folder)
    return listed(names)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - _OF_ALL


def listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def files_in_guide(text: str) -> dict[str, str]:
    """The third column of the table of targets, by name."""
    rows = (line.split(" | ") for line in section(text, "targets").splitlines()[2:])
    return {row[0].strip("| `"): row[2] for row in rows if len(row) > 2}


def section(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found, f"{GUIDE.name} has no section {name}"
    return found[1].strip()


def main() -> None:
    text = GUIDE.read_text()
    contents = {
        "targets": targets({name: files_of(name) for name in TARGETS}),
        "holdings": holdings(),
        "refusals": refusals(),
    }
    for name, content in contents.items():
        begin, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{begin}<!-- {name} -->\n{content}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    GUIDE.write_text(text)


if __name__ == "__main__":
    main()
