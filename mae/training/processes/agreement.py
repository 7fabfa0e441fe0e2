"""Agreement: all ranks start with the same settings, data, plan and libraries."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from textwrap import shorten

from accelerate import Accelerator
from accelerate.utils import gather_object

from mae.errors import UserError


def require_agreement(accelerator: Accelerator, **facts: str) -> None:
    """Raise an error unless all ranks hold the same facts. Collective.

    Raises:
        UserError: on every rank, naming each fact that differs and its first difference.
    """
    if accelerator.num_processes == 1:
        return
    ranks: list[dict[str, str]] = gather_object([facts])
    if len({tuple(rank) for rank in ranks}) > 1:
        ranks = [{"versions of mae (the facts that they compare)": ", ".join(rank)} for rank in ranks]
    texts = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    differing = [f"{name}: {_difference(each)}" for name, each in texts.items() if len(set(each)) > 1]
    if differing:
        raise UserError(
            f"the processes differ in their {'; '.join(differing)}; "
            "start them all with the same command, files and library versions"
        )


def _difference(texts: Sequence[str]) -> str:
    """Describe the first part (a line, or text between commas) in which a rank differs from rank 0."""
    rank = next(rank for rank, text in enumerate(texts) if text != texts[0])
    parts = zip_longest(*(re.split(r"[\n,]", texts[which]) for which in (0, rank)), fillvalue="")
    ours, theirs = next((ours, theirs) for ours, theirs in parts if ours != theirs)
    return f"{shorten(ours, 80) or 'nothing'} on rank 0, {shorten(theirs, 80) or 'nothing'} on rank {rank}"
