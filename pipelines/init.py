"""Look at images and at this machine, and write settings to start with.

mae init images --out config.yaml
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional

from mae.data.packing.label_table import read_label_table
from mae.data.packing.trees import Labels
from mae.data.store.urls import redacted, scheme_of
from mae.errors import UserError, one_line_errors
from mae.files import write_atomically
from mae.output import say
from mae.proposal.choice import Proposal, times_in_words
from mae.proposal.commands import next_commands
from mae.proposal.facts import Facts
from mae.proposal.looking import look_into
from mae.proposal.machine import look_at_machine, measured_flops
from mae.proposal.rules import propose
from mae.proposal.sampling import look_at
from mae.proposal.yaml_text import finetune_yaml, pretrain_yaml, summary
from mae.settings import check, parse
from mae.training.processes.accelerator import start_accelerator


@dataclass(frozen=True)
class InitSettings:
    """Look at images and at this machine; write settings to start with, each with its reason, and say what comes next.

    All images are counted, some are decoded, and training is timed for a second or two. Nothing else is written.
    """

    EXAMPLE: ClassVar = "mae init images --out config.yaml"
    FIRST: ClassVar = ("out", "hours")

    source: Positional[str]
    """A folder of images, with class folders or splits in it as `mae pack` takes it; or shards: a tar, a folder, a
    glob, braces or a URL. Shards with train, val or test in their names are splits."""
    out: Path = Path("config.yaml")
    """New file for the settings of pretraining. Those of fine-tuning are beside it, in a file named -finetune."""
    hours: float | None = None
    """Time that pretraining may take; None: 1 hour on a CPU, any time on a GPU."""
    labels: Labels = "auto"
    """folders: the topmost folder of an image is its class; none: images in folders have no labels. auto: folders if
    the images are in folders, none if all are in one."""
    label_file: Path | None = None
    """CSV file with the class of each image, as `mae pack` takes it."""
    split: str | None = None
    """Name of the split, if folders called train, val or test are classes; else None."""
    overwrite: bool = False
    """Replace files that exist already."""

    def __post_init__(self) -> None:
        check(self.hours is None or 0 < self.hours < 1e6, "hours", self.hours, "above 0, or None")
        check(self.label_file is None or self.labels == "auto", "labels", self.labels, "auto with --label_file")
        check(self.out.suffix in (".yaml", ".yml"), "out", self.out, "a name in .yaml or .yml")

    @property
    def finetune_out(self) -> Path:
        """File for the settings of fine-tuning."""
        return self.out.with_stem(f"{self.out.stem}-finetune")


def run(settings: InitSettings) -> Proposal:
    """Look, propose, write and say what comes next."""
    for path in (settings.out, settings.finetune_out):
        if path.exists() and not settings.overwrite:
            raise UserError(f"{path} exists; give another --out, or replace it with --overwrite")
    facts, proposal = _proposed(settings)
    commands = next_commands(facts, proposal, settings.out, settings.finetune_out)
    pretrain = next(command for command in commands if "pretrain" in command)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.out, pretrain_yaml(facts, proposal, pretrain).encode())
    for line in (*summary(facts), times_in_words(proposal), *proposal.remarks):
        say(line)
    written = [str(settings.out)]
    if proposal.finetune:
        finetune = next(command for command in commands if "finetune --config" in command)
        write_atomically(settings.finetune_out, finetune_yaml(proposal, finetune).encode())
        written.append(str(settings.finetune_out))
    say(f"wrote {' and '.join(written)}; next:")
    for command in commands:
        say(f"  {command}")
    return proposal


def _proposed(settings: InitSettings) -> tuple[Facts, Proposal]:
    """Propose by the speed of a small model; then time what is proposed, until that is not new any more."""
    table = read_label_table(settings.label_file) if settings.label_file else None
    look = look_into(settings.source, settings.labels, settings.split, say, table)
    images = look_at(look.images)
    if look.measured:  # on more images than the sample
        images = replace(images, statistics=look.statistics, measured=look.measured)
    accelerator = start_accelerator("auto")
    labels, file = settings.labels, settings.label_file
    flags = {
        "--labels": None if labels == "auto" else labels,
        "--label_file": str(file) if file else None,
        "--split": settings.split,
    }
    facts = Facts(
        source=redacted(settings.source) if scheme_of(settings.source) else settings.source,
        name=_name_of(settings.source),
        splits=look.splits,
        images=images,
        machine=look_at_machine(accelerator),
        class_names=look.class_names,
        pack_flags=tuple(word for flag, value in flags.items() if value is not None for word in (flag, value)),
        notices=look.notices,
        hours=settings.hours,
    )
    proposal = propose(facts)
    while (key := (proposal.model, proposal.image_size)) not in facts.machine.measured:
        measured = {**facts.machine.measured, key: measured_flops(accelerator, *key, proposal.channels)}
        facts = replace(facts, machine=replace(facts.machine, measured=measured))
        proposal = propose(facts)
    return facts, proposal


def _name_of(source: str) -> str:
    """Return a short name for the folders of shards and runs: that of the folder which holds the images."""
    path = Path(source if scheme_of(source) else Path(source).expanduser().absolute())
    folder = path if Path(source).is_dir() else path.parent
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-") or "images"


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae init`."""
    with one_line_errors():
        run(parse(InitSettings, sys.argv[1:] if argv is None else argv, prog="mae init"))


if __name__ == "__main__":
    main()
