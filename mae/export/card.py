"""Model card of an export, `README.md`: what the model is, how it was trained, and how it is loaded.

Equal models give equal cards: there is no date in them, and no path or name of a machine.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mae.export.card_training import training_rows
from mae.export.facts import Facts, facts_of
from mae.export.left_behind import describe_left_behind
from mae.export.publish import CARD_FILE, PICTURE_FILE, VERIFICATION_FILE
from mae.export.results import OWN_HEAD
from mae.export.table import amounts, by, safe, table
from mae.export.target import Target
from mae.export.trained_model import TrainedModel
from mae.files import write_atomically
from mae.models.sizes import TEMPERATURE
from mae.output import counted

_MOST_CLASSES = 50
_CHANNELS = {1: "gray", 3: "RGB"}
_POOLED = {
    "cls": "the cls token after the last norm",
    "avg": "the mean of the patch tokens, then a norm",
    "cls+avg": "the cls token and the mean of the patch tokens, both after the last norm",
}
_HEADS = {"linear": "one linear layer", "mlp": "one hidden layer of the encoder's width, with GELU"}
_LICENCE = (
    "None is stated. Whoever publishes this model chooses one, and adds `license:` to the first lines of this file "
    "([identifiers](https://huggingface.co/docs/hub/repositories-licenses)). The images that it was trained on may "
    "limit the choice."
)


def write_card(target: Target, model: TrainedModel, folder: Path) -> None:
    """Write the card of a verified export into its folder, and its picture of reconstructions if there is one."""
    facts = facts_of(model)
    if facts.picture is not None:
        shutil.copyfile(facts.picture, folder / PICTURE_FILE)
    proof = json.loads((folder / VERIFICATION_FILE).read_bytes())
    write_atomically(folder / CARD_FILE, card(target, model, facts, proof).encode("utf-8", "replace"))


def card(target: Target, model: TrainedModel, facts: Facts, proof: dict[str, Any]) -> str:
    """Return the text of a card; `proof` is the content of `verification.json`."""
    kept = target.kept(model)
    has_head = bool(set(model.head_names) & kept.keys())
    sections = [
        ("Load it", _loading(target, model)),
        ("What it is", table(_architecture(model, kept))),
        ("Images", _preprocessing(target, model)),
        ("Classes", _classes(model) if has_head else ""),
        ("Training", table(training_rows(model.description, facts))),
        ("Results", _results(facts, has_head)),
        ("Reconstructions", _reconstructions(facts)),
        ("Left behind", _left_behind(target, model)),
        ("Verification", _verification(proof)),
        ("Licence", _LICENCE),
    ]
    text = "".join(f"\n## {title}\n\n{content}\n" for title, content in sections if content)
    origin = f"Exported by `mae export --to {target.name}`, and [found equal](#verification) to the trained model."
    return f"{_front_matter(target, model, kept)}\n# {_title(model, kept)}\n\n{origin}\n{text}"


def _front_matter(target: Target, model: TrainedModel, kept: Iterable[str]) -> str:
    """Return what the Hugging Face hub reads."""
    task = "image-classification" if set(model.head_names) & set(kept) else "image-feature-extraction"
    lines = [
        *([f"library_name: {target.hub_library}"] if target.hub_library else []),
        # With a decoder, the pipelines of transformers would hide patches.
        *([] if set(model.decoder_names) & set(kept) else [f"pipeline_tag: {task}"]),
        "tags:",
        *(f"- {tag}" for tag in ("vision-transformer", "masked-autoencoder")),
        "# license: not stated; see the last section",
    ]
    return "".join(f"{line}\n" for line in ("---", *lines, "---"))


def _title(model: TrainedModel, kept: Iterable[str]) -> str:
    if set(model.head_names) & set(kept):
        return f"Vision Transformer that tells {len(model.classes)} classes of images apart"
    if set(model.decoder_names) & set(kept):
        return "Masked autoencoder: Vision Transformer and decoder"
    if model.description.kind == "classifier":
        return "Vision Transformer, the encoder of a classifier of images"
    return "Vision Transformer, the encoder of a masked autoencoder"


def _loading(target: Target, model: TrainedModel) -> str:
    channels, size, lines = model.description.channels, model.description.image_size, target.example(model, ".")
    taken = f"`images` is a float32 tensor [batch, {channels}, {size[0]}, {size[1]}], prepared as [below](#images)."
    return f"With {target.library}, in this folder:\n\n```python\n{lines}\n```" + (
        f"\n\n{taken}" if "(images)" in lines else ""
    )


def _architecture(model: TrainedModel, kept: dict[str, Any]) -> Iterator[tuple[str, str]]:
    described = model.description
    yield (
        "encoder",
        f"ViT: width {described.width}, {counted(described.depth, 'block')}, {counted(described.heads, 'head')}, "
        f"patches of {by(described.patch_size)} pixels",
    )
    if described.position_temperature != TEMPERATURE:
        yield "positions", f"sine-cosine, of temperature {described.position_temperature:g} when training began"
    parts = {"encoder": model.encoder_weights.keys(), "head": model.head_names, "decoder": model.decoder_names}
    counts = {part: sum(kept[name].numel() for name in names if name in kept) for part, names in parts.items()}
    yield "parameters", ", ".join(f"{count:,} in the {part}" for part, count in counts.items() if count)
    channels = described.channels
    named = counted(channels, "channel") + (f" ({_CHANNELS[channels]})" if channels in _CHANNELS else "")
    yield "images", f"{by(described.image_size)} pixels [height x width], {named}"
    yield "pool", f"{described.pool}: {_POOLED[described.pool]}"
    if model.head is not None and counts["head"]:
        yield "head", f"{_HEADS[model.head]}, {len(model.classes)} classes"


def _preprocessing(target: Target, model: TrainedModel) -> str:
    described = model.description
    cover = tuple(int(side / described.crop_pct) for side in described.image_size)
    inside = " (the model does this itself)" if target.takes_pixels else ""
    steps = []
    if described.value_range is not None:
        ranges = "; ".join(f"{low:g} to {high:g}" for low, high in zip(*[iter(described.value_range)] * 2, strict=True))
        steps.append(f"Images of more than 8 bits: divide the values from {ranges} into 256 equal levels, 0 to 255.")
    steps += [
        f"Resize, bicubic with antialiasing, until the image just covers {by(cover)} pixels [height x width].",
        f"Crop {by(described.image_size)} pixels from the centre.",
        f"Divide by 255{inside}.",
        f"Of each channel, subtract the mean and divide by the standard deviation{inside}: "
        f"mean {amounts(described.mean)}, standard deviation {amounts(described.std)}.",
    ]
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _classes(model: TrainedModel) -> str:
    names = [f"{label}: {safe(name)}" for label, name in enumerate(model.classes[:_MOST_CLASSES])]
    more = len(model.classes) - _MOST_CLASSES
    if model.description.classes is None:
        return f"{len(model.classes)} classes without names; the outputs are in the order of their labels."
    return ", ".join(names) + (f", and {more:,} more, {len(model.classes):,} in all" if more > 0 else "")


def _results(facts: Facts, has_head: bool) -> str:
    titles = ("encoder", "protocol", "result", "measured on", "remarks")
    rows = []
    for result in facts.results:
        remarks = [result.remarks] if result.remarks else []
        if result.protocol in OWN_HEAD and not has_head:
            remarks.append("with the head, which is left behind")
        rows.append([safe(text) for text in (*result[:-1], "; ".join(remarks))])
    return table(rows, titles)


def _reconstructions(facts: Facts) -> str:
    if facts.picture is None:
        return ""
    return f"Original, masked, reconstructed; drawn after step {int(facts.picture.stem[5:]):,}.\n\n![]({PICTURE_FILE})"


def _left_behind(target: Target, model: TrainedModel) -> str:
    names = target.left_behind(model)
    return (
        f"This folder does not hold {safe(describe_left_behind(model, names))}. `--to` is an option of `mae export`."
        if names
        else ""
    )


def _verification(proof: dict[str, Any]) -> str:
    rows = [
        (each["output"], f"{each['greatest_difference']:.1e}", f"{each['greatest_value']:.3g}")
        for each in proof["outputs"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in proof["versions"].items())
    return (
        f"The folder was loaded back, and its outputs were compared with those of the model on {proof['inputs']}. "
        f"Allowed is {proof['tolerance']:g} of the greatest value.\n\n"
        + table(rows, ("output", "greatest difference", "greatest value"))
        + f"\n\n{versions}. `{VERIFICATION_FILE}` has all of it."
    )
