"""YAML files of a proposal: a summary of what was seen, then each setting with its reason."""

import textwrap
from collections.abc import Iterator, Sequence
from statistics import median

import yaml

from mae.output import one_line
from mae.proposal.choice import Choice, Proposal, times_in_words
from mae.proposal.facts import Facts, SplitFacts
from mae.proposal.shapes import short_side

_WIDTH = 118
_MOST_CLASSES = 8


def pretrain_yaml(facts: Facts, proposal: Proposal, command: str) -> str:
    """Return the file for `mae pretrain --config`."""
    lines = [*summary(facts), times_in_words(proposal), *proposal.remarks, command]
    return _comments(lines) + _settings(proposal.pretrain)


def finetune_yaml(proposal: Proposal, command: str) -> str:
    """Return the file for `mae finetune --config`."""
    lines = ["The shape of the encoder and the size of the images come from --init.", command]
    return _comments(lines) + _settings(proposal.finetune)


def summary(facts: Facts) -> Iterator[str]:
    """Yield what was seen: counts of all images, and the rest of a sample."""
    yield f"{facts.source}: {'; '.join(map(_split, facts.splits))}."
    if facts.train.per_class:
        yield _classes(facts)
    images = facts.images
    heights, widths = zip(*images.sizes, strict=True)
    aspects = sorted(width / height for height, width in images.sizes)
    sides = sorted(map(min, images.sizes))
    yield (
        f"{images.sampled:,} images of {facts.train.name} were decoded: short sides {sides[0]} to {sides[-1]} pixels, "
        f"median {short_side(images)}; median {median(widths):.0f} wide, {median(heights):.0f} high; width / height "
        f"{aspects[0]:.2f} to {aspects[-1]:.2f}."
    )
    planes = ", ".join(f"{planes} in {count:,} images" for planes, count in sorted(images.planes.items()))
    bits = f"{images.wide}" if images.wide.images else "8 bits"
    measured = f"; {images.statistics} on {images.measured:,} images" if images.statistics else ""
    yield f"Colour planes: {planes}; {bits}{measured}. Training takes mean and std from mae pack, or measures them."
    machine = facts.machine
    gpu = f"{machine.gpus} x {machine.gpu}, " if machine.gpu else ""
    yield (
        f"This machine: {gpu}{machine.cores} CPU cores, {machine.memory / 1e9:.0f} GB; in a test of a second, training "
        f"reached {machine.flops / 1e9:,.0f} GFLOP/s."
    )
    yield from facts.notices


def _split(split: SplitFacts) -> str:
    return f"{split.images:,} images in {split.name}" + (", all labelled" if split.labelled else "")


def _classes(facts: Facts) -> str:
    counts = facts.train.per_class
    names = [facts.class_names[label] if label < len(facts.class_names) else str(label) for label in counts]
    few = [f"{name} {count:,}" for name, count in zip(names, counts.values(), strict=True)][:_MOST_CLASSES]
    more = f" and {len(counts) - len(few):,} more" if len(counts) > len(few) else ""
    return f"Classes of {facts.train.name}: {len(counts):,} ({', '.join(few)}{more})."


def _comments(lines: Sequence[str]) -> str:
    wrapped = [part for line in lines for part in _wrapped(one_line(line))]
    return "".join(f"# {line}\n" for line in wrapped)


def _wrapped(line: str) -> list[str]:
    is_command = line.startswith("mae ")
    return [f"  {line}"] if is_command else textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _settings(choices: Sequence[Choice]) -> str:
    """Return the settings, those of each section together, in the order in which their sections come first."""
    sections: dict[str, list[Choice]] = {}
    for choice in choices:
        sections.setdefault(choice.name.rpartition(".")[0], []).append(choice)
    text = ""
    for section, members in sections.items():
        text += f"{section}:\n" if section else ""
        for choice in members:
            line = f"{'  ' if section else ''}{choice.name.rpartition('.')[2]}: {_value(choice.value)}"
            text += f"{line}  # {one_line(choice.reason)}\n"
    return text


def _value(value: object) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], int):
        value = value[0]
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
    return text.removesuffix("...\n").rstrip("\n")
