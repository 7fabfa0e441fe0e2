"""Agreement of all ranks on what they start with."""

import hashlib
import re
from collections.abc import Sequence
from itertools import zip_longest
from textwrap import shorten

import torch
from accelerate import Accelerator
from torch import Tensor

from mae.errors import UserError


def require_agreement(accelerator: Accelerator, **facts: str) -> None:
    """Every rank must hold the same facts, or nothing starts.

    Raises:
        UserError: on every rank, naming the facts that differ, and the first difference in each.
    """
    if accelerator.num_processes == 1:
        return
    names = ", ".join(facts)
    if any(_differ(accelerator, [names])):
        facts = {"versions of mae, which compare": names}
    differs = _differ(accelerator, list(facts.values()))
    differing = [
        f"{name}: {_difference(_of_all_ranks(accelerator, fact))}"
        for (name, fact), is_different in zip(facts.items(), differs, strict=True)
        if is_different
    ]
    if differing:
        raise UserError(
            f"the processes differ in their {'; '.join(differing)}; "
            "start them all with the same command, files and library versions"
        )


def _differ(accelerator: Accelerator, facts: Sequence[str]) -> list[bool]:
    """Of each fact, whether the ranks hold different ones."""
    hashes = [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:7], "big") for fact in facts]
    everyone: Tensor = accelerator.gather(torch.tensor([hashes], dtype=torch.int64, device=accelerator.device))
    return [len(set(column)) > 1 for column in everyone.T.tolist()]


def _of_all_ranks(accelerator: Accelerator, fact: str) -> list[str]:
    """A text of any length of each rank; as bytes, for nothing is unpickled here."""
    data = fact.encode()
    lengths = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    padded = torch.tensor([list(data.ljust(max(lengths)))], dtype=torch.uint8, device=accelerator.device)
    everyone = accelerator.gather(padded).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(everyone, lengths, strict=True)]


def _difference(texts: Sequence[str]) -> str:
    """The first part (a line, or what stands between commas) in which a rank differs from rank 0."""
    rank = next(rank for rank, text in enumerate(texts) if text != texts[0])
    parts = zip_longest(*(re.split(r"[\n,]", texts[which]) for which in (0, rank)), fillvalue="")
    ours, theirs = next((ours, theirs) for ours, theirs in parts if ours != theirs)
    return f"{shorten(ours, 80) or 'nothing'} on rank 0, {shorten(theirs, 80) or 'nothing'} on rank {rank}"
