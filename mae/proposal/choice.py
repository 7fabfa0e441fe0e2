"""Proposed settings, each with its reason."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from mae.models.settings import MaskedAutoencoderSettings

_CHECKPOINT_SECONDS = 600


class Choice(NamedTuple):
    """Proposed value of one setting."""

    name: str
    """Full name, such as `data.image_size`."""
    value: Any
    reason: str


@dataclass(frozen=True)
class Proposal:
    """Settings of pretraining, and of fine-tuning where there are labels, with what a person should know."""

    model: MaskedAutoencoderSettings
    image_size: tuple[int, int]
    channels: int
    seconds: float
    """Estimated time of pretraining."""
    pretrain: tuple[Choice, ...]
    finetune: tuple[Choice, ...] = ()
    """None: the images have no labels, or only one class."""
    finetune_seconds: float = 0.0
    """Estimated time of fine-tuning."""
    pack: tuple[str, ...] = ()
    """Flags of `mae pack`, besides source and output."""
    remarks: tuple[str, ...] = ()
    """What is given up, what is missing, and what looks wrong: one sentence each."""


def times_in_words(proposal: Proposal) -> str:
    """Return how long the proposed runs take."""
    tuning = f", and fine-tuning about {in_words(proposal.finetune_seconds)}" if proposal.finetune else ""
    return f"Pretraining takes about {in_words(proposal.seconds)}{tuning}."


def in_words(seconds: float) -> str:
    """Return a time as a person says it: `40 seconds`, `25 minutes`, `3.5 hours`, `12 days`."""
    for unit, length, most in (("seconds", 1, 100), ("minutes", 60, 100), ("hours", 3600, 72)):
        number = seconds / length
        if number < most:
            return f"{number:.1f} {unit}" if unit == "hours" and number < 10 else f"{max(1, round(number))} {unit}"
    return f"{seconds / 86400:,.0f} days"


def rounded_down(number: float) -> int:
    """Return a whole number of at most two digits that are not zero, at least 1: 178 becomes 170."""
    whole = max(1, int(number))
    step = 10 ** max(0, len(str(whole)) - 2)
    return int(whole // step * step)


def checkpoints_of(steps: int, seconds: float) -> Choice:
    """Return the steps between the checkpoints of a run of so many steps that takes so many seconds."""
    tenth, of_time = rounded_down(steps / 10), rounded_down(steps * _CHECKPOINT_SECONDS / seconds)
    why = "steps: a tenth of the run" if tenth < of_time else "steps: about ten minutes"
    return Choice("checkpoint_every", min(tenth, of_time), why)


def power_of_two(number: float, least: int, most: int) -> int:
    """Return the greatest power of two up to `number`, from `least` to `most`, which are powers of two."""
    return max(least, min(most, 1 << max(0, int(number).bit_length() - 1)))
