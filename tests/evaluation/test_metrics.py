"""Measures of a classification by hand, and by torchmetrics' definition of calibration."""

import numpy as np
import pytest

from mae.evaluation.metrics import calibration_error, confusion, measures, per_class
from mae.evaluation.protocols.outcome import Outcome
from mae.evaluation.results import cells, markdown, row_of

SCORES = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
LABELS = np.array([0, 1, 1, 0])


def test_measures_by_hand() -> None:
    found = measures(SCORES, LABELS, are_probabilities=True)
    assert found["top1"] == 0.5
    assert found["balanced"] == 0.5  # classes 0 and 1 half each; class 2 has no samples
    assert "top5" not in found
    # Bins of 1/15: 0.7, 0.8, 0.5 and 0.6 are each alone; right, right, wrong, wrong.
    assert found["ece"] == pytest.approx((0.3 + 0.2 + 0.5 + 0.6) / 4)
    assert "ece" not in measures(SCORES, LABELS, are_probabilities=False)
    assert per_class(SCORES, LABELS) == [0.5, 0.5, None]
    assert confusion(SCORES, LABELS).tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_top5_of_many_classes() -> None:
    scores = np.tile(np.arange(8.0), (8, 1))
    found = measures(scores, np.arange(8), are_probabilities=False)
    assert (found["top1"], found["top5"]) == (1 / 8, 5 / 8)


def test_the_calibration_error_of_a_calibrated_forecast_is_small() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), 20_000)
    labels = (random.random(20_000)[:, None] > probabilities.cumsum(1)).sum(1)
    assert calibration_error(probabilities, labels) < 0.02
    sharper = probabilities**4 / (probabilities**4).sum(1, keepdims=True)
    assert calibration_error(sharper, labels) > 0.15
    assert calibration_error(np.eye(3)[labels], labels) == 0.0


def test_rows_have_mean_and_deviation_and_each_choice_once() -> None:
    choices = [{"feature": "cls raw", "k": k, "temperature": 0.07} for k in (5, 5, 20)]
    orders = ([0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3])
    outcomes = [
        (seed, Outcome(SCORES[order], True, 9, chosen))
        for seed, (order, chosen) in enumerate(zip(orders, choices, strict=True))
    ]
    row = row_of("a|b", "knn", outcomes, LABELS, ["selected on this set"], {"model": "m"})
    top1 = [0.5, 0.5, 0.0]
    assert row.mean("top1") == pytest.approx(np.mean(top1))
    assert row.deviation("top1") == pytest.approx(np.std(top1, ddof=1))
    assert row.mean("top5") is None
    assert np.sum(row.confusion) == 12
    assert cells(row)[:4] == ["a|b", "knn", "cls raw, k 5 / cls raw, k 20", "33.3 ± 28.9"]
    assert markdown([row]).splitlines()[2].startswith("| a&#124;b | knn | cls raw, k 5")
    value = row.to_json()
    assert value["top1"] == {"mean": row.mean("top1"), "deviation": row.deviation("top1")}
    assert [trial["seed"] for trial in value["trials"]] == [0, 1, 2]
    one = row_of("a", "knn", outcomes[:1], LABELS, [], {})
    assert one.deviation("top1") is None
    assert cells(one)[3] == "50.0"
