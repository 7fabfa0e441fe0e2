"""Results of a model: those of `mae evaluate`, or those that its run has measured, each with its protocol."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mae.formats.config_values import mapping
from mae.models.selection import Selection
from mae.run_files import figures, is_number

THIS_MODEL = "this model"
OWN_HEAD = ("accuracy with its own head", "head")
"""Names under which the accuracy with the head of the model is measured: in a run, and by `mae evaluate`."""
_MEASURES = {"top1": "top-1", "top5": "top-5", "balanced": "balanced accuracy"}
_SELECTED = "selected on this set"


class Result(NamedTuple):
    """One line of the table of results."""

    encoder: str
    """`this model`, or a baseline."""
    protocol: str
    figures: str
    samples: str
    """Samples that it was measured on."""
    remarks: str


def evaluated(content: Mapping[str, Any], sha256: str, selection: Selection | None) -> Iterator[Result]:
    """Yield the rows of an evaluation, from the content of its `results.json`.

    Nothing is yielded unless the evaluation judged the model file with this sha256. The rows of baselines follow, those
    of other models do not.
    """
    rows = [row for row in _list(content.get("rows")) if isinstance(row, dict)]
    own = [row for row in rows if mapping(row.get("about")).get("sha256") == sha256]
    if not own:
        return
    test = mapping(content.get("test"))
    fingerprint, samples = test.get("fingerprint"), _samples(test.get("samples"), test.get("fingerprint"))
    is_selected = selection is not None and fingerprint == selection.fingerprint
    for row in own:
        yield Result(THIS_MODEL, str(row.get("protocol")), _figures(row), samples, _SELECTED if is_selected else "")
    for row in rows:
        if not mapping(row.get("about")):
            yield Result(str(row.get("encoder")), str(row.get("protocol")), _figures(row), samples, "")


def measured_in_run(
    records: list[dict[str, Any]], selection: Selection | None, ended_early: bool
) -> tuple[Result, ...]:
    """Return what a run has last measured of the weights: accuracy, or the figures of an evaluation while pretraining.

    Args:
        records: Records of the run until the weights were saved.
        selection: Why the weights are the best of the run.
        ended_early: Whether the run ended before its last step because its accuracy no longer rose.
    """
    if accuracies := figures(records, "eval", "accuracy", "samples")[-1:]:
        last, remark = accuracies[-1], _SELECTED if selection else "chose when the run ended" if ended_early else ""
        measured = _samples(last["samples"], selection and selection.fingerprint)
        return (Result(THIS_MODEL, OWN_HEAD[0], f"{100 * last['accuracy']:.2f} %", measured, remark),)
    if selection:
        measured = _samples(None, selection.fingerprint)
        return (Result(THIS_MODEL, OWN_HEAD[0], f"{100 * selection.accuracy:.2f} %", measured, _SELECTED),)
    found = figures(records, "evaluation", "samples")[-1:]
    shown = {
        "loss": ("loss on hidden patches", "{:.4f}"),
        "knn": ("k-NN accuracy", "{:.1%}"),
        "few_shot": ("few-shot accuracy", "{:.1%}"),
        "rank": ("effective rank of the features", "{:.1f}"),
    }
    return tuple(
        Result(
            THIS_MODEL,
            protocol,
            text.format(record[name]).replace("%", " %"),
            _samples(record["samples"], None),
            "in pretraining",
        )
        for record in found
        for name, (protocol, text) in shown.items()
        if record.get(name) is not None and figures([record], "evaluation", name)
    )


def _figures(row: Mapping[str, Any]) -> str:
    """Return each measure of a row as mean ± deviation, in percent."""
    found = []
    for name, title in _MEASURES.items():
        measure = mapping(row.get(name))
        mean, deviation = measure.get("mean"), measure.get("deviation")
        if is_number(mean):
            spread = f" ± {100 * deviation:.1f}" if is_number(deviation) else ""
            found.append(f"{title} {100 * mean:.1f} %{spread}")
    return ", ".join(found)


def _samples(count: object, fingerprint: object) -> str:
    number = f"{count:,} samples" if isinstance(count, int) else "samples"
    return f"{number} (fingerprint {fingerprint[:12]})" if isinstance(fingerprint, str) else number


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
