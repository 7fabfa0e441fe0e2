"""Judge encoders by labelled samples: nearest neighbours, linear probes, fine-tuning, and what pixels give.

mae evaluate runs/first --data.shards 'shards/train-*.tar' --eval_shards 'shards/test-*.tar'
"""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mae.data.index import ShardIndex
from mae.evaluation.features import compute, read, speed
from mae.evaluation.judging import HEAD, LabelledSets, Subject, judge, load_models, subjects
from mae.evaluation.results import Row, chosen, plain
from mae.evaluation.settings import EvaluateSettings, open_sets
from mae.evaluation.trained import judge_trained, require_trainable, trainees
from mae.files import try_to_write
from mae.formats.opening import open_model
from mae.output import say as print_line
from mae.progress import working
from mae.report.evaluation import write_evaluation
from mae.settings import check_name, parse
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once
from mae.versions import library_versions


def run(settings: EvaluateSettings, command: str = "") -> list[Row]:
    """Judge all models by all protocols, and write the results; return the rows, on the first process only."""
    accelerator = start_accelerator("fp32")
    say = print_line if accelerator.is_main_process else lambda text: None
    normalization, heads = settings.data.normalization, settings.data.heads
    opened = [open_model(source, normalization, heads, best=True) for source in settings.source]
    first = opened[0].require_normalization().description
    out = settings.out or opened[0].beside("evaluation")
    check_name("out", out)
    for stored in opened:
        if stored.report is not None:
            say(f"model {stored.path}{stored.summary}")
    sets = open_sets(settings, first, say)
    rules = settings.rules(accelerator.device)
    loaded = load_models(opened, accelerator.device)
    judged, trained = subjects(loaded, sets, rules), trainees(loaded, sets, rules)
    if trained:
        require_trainable(trained, sets, rules, settings.data.as_seen_by, accelerator)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        try_to_write(out)
    for subject in judged:
        for extraction in subject.extractions:
            data = settings.data.as_seen_by(extraction.description)
            for index in (sets.train, sets.test):
                compute(extraction, index, data, accelerator, subject.name)
    cache = settings.data.as_seen_by(first).cache
    # What the first process has computed is in its cache.
    about = _about(settings, command, sets, judged, cache) if accelerator.is_main_process else {}
    tuned = list[Row]()
    # Before the rest, in which all processes but the first have nothing to do, and would wait too long.
    for row in _said(judge_trained(trained, sets, rules, settings.data.as_seen_by, accelerator), say):
        tuned.append(row)
        if accelerator.is_main_process:
            write_evaluation(out, tuned, about, is_finished=False)
    if not accelerator.is_main_process:
        return []
    frozen = list[Row]()
    for subject in judged:
        with working(f"judging {subject.name}"):
            found = list(judge(subject, partial(read, cache=cache), sets, rules))
        frozen += _said(found, say)
    rows = [*frozen, *tuned]
    write_evaluation(out, rows, about)
    for line in (*plain(rows), f"results with all that was chosen: {out / 'results.md'}"):
        print_line(line, is_result=True)
    return rows


def _said(rows: Iterable[Row], say: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows, and report each at once."""
    for row in rows:
        say(f"{row.encoder}, {row.protocol}: top-1 {row.mean('top1'):.1%}, {chosen(row)}")
        yield row


def _about(
    settings: EvaluateSettings, command: str, sets: LabelledSets, judged: Sequence[Subject], cache: Path
) -> dict[str, Any]:
    """Return all that the results say beside their rows."""
    return {
        "command": command,
        "versions": library_versions(),
        "train": _described(sets.train, settings.data.shards),
        "test": _described(sets.test, settings.eval_shards),
        "speed": {_computed(subject): speed(subject.extractions[-1], sets.test, cache) for subject in judged},
        "classes": sets.names or list(map(str, range(sets.classes))),
    }


def _computed(subject: Subject) -> str:
    """Name what is computed of the images: an encoder and its head have one name."""
    return f"{subject.name}, {HEAD}" if HEAD in subject.protocols else subject.name


def _described(index: ShardIndex, shards: Sequence[str]) -> dict[str, Any]:
    return {"shards": list(shards), "samples": len(index), "fingerprint": index.fingerprint}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae evaluate`."""
    words = sys.argv[1:] if argv is None else argv
    with errors_said_once():
        run(parse(EvaluateSettings, words, prog="mae evaluate"), shlex.join(["mae", "evaluate", *words]))


if __name__ == "__main__":
    main()
