"""The commands that follow a proposal, in order, to be pasted into a shell."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from mae.proposal.choice import Proposal
from mae.proposal.facts import Facts


def next_commands(facts: Facts, proposal: Proposal, config: Path, finetune_config: Path) -> list[str]:
    """Return the commands from the source to predictions, or to features if there are no labels."""
    words = [
        *_pack(facts, proposal),
        [*_train(facts, "pretrain"), "--config", str(config)],
    ]
    if proposal.finetune:
        init = ["--init", facts.run_dir]
        words += [[*_train(facts, "finetune"), "--config", str(finetune_config), *init], *_judge(facts)]
        words += [["mae", "predict", facts.tuned_dir, *_to_apply(facts), "--out", "predictions.csv"]]
    else:
        words += [["mae", "embed", facts.run_dir, *_to_apply(facts), "--out", "features.parquet"]]
    return [shlex.join(command) for command in words]


def _pack(facts: Facts, proposal: Proposal) -> Iterator[list[str]]:
    if not facts.train.shards:
        yield ["mae", "pack", facts.source, "--out", facts.packed, *proposal.pack]


def _train(facts: Facts, stage: str) -> list[str]:
    return ["accelerate", "launch", "-m", f"mae.pipelines.{stage}"] if facts.machine.gpus > 1 else ["mae", stage]


def _judge(facts: Facts) -> Iterator[list[str]]:
    if facts.final is not None and facts.final.labelled:
        train, final = facts.shards_of(facts.train), facts.shards_of(facts.final)
        shards = ["--data.shards", *train, "--eval_shards", *final]
        yield ["mae", "evaluate", facts.run_dir, facts.tuned_dir, *shards]


def _to_apply(facts: Facts) -> list[str]:
    """Return images to apply the model to: those that were held out, if there are any."""
    split = facts.final or facts.train
    return [split.folder] if split.folder and not split.shards else list(split.shards)
