"""Protocols agree with scikit-learn, find what is separable, and choose on held-out training samples only."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from mae.errors import UserError
from mae.evaluation import feature_set
from mae.evaluation.feature_set import KINDS, PIXELS, FeatureSet, limited, split_off
from mae.evaluation.metrics import measures
from mae.evaluation.protocols import few_shot, knn, linear, logistic, svm
from mae.evaluation.protocols.outcome import Outcome, accuracy

CPU = torch.device("cpu")
CLASSES = 4


def blobs(samples: int, spread: float, seed: int = 0, width: int = 6) -> FeatureSet:
    """Features in four clouds; the raw cls token alone tells the class, all else is noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, samples)
    centres = np.random.default_rng(99).normal(size=(CLASSES, width))
    values = random.normal(size=(samples, 2, 2 * width))
    values[:, 0, :width] = 4 * centres[labels] + spread * random.normal(size=(samples, width))
    return FeatureSet(values.astype(np.float32), labels)


def judged(protocol: str, train: FeatureSet, test: FeatureSet, kinds: tuple[str, ...] = KINDS) -> list[Outcome]:
    if protocol == "knn":
        return [knn.judge(train, test, CLASSES, 0, kinds, CPU)]
    if protocol == "linear":
        return [linear.judge(train, test, CLASSES, 0, kinds, CPU)]
    return few_shot.judge(train, test, CLASSES, 0, kinds, CPU, shots=5, splits=2)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_equal_those_of_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(150, 4.0), blobs(40, 4.0, seed=1)
    known, queries = train.of("cls raw"), test.of("cls raw")
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / knn.TEMPERATURE))
    expected = model.fit(known, train.labels).predict_proba(queries)
    monkeypatch.setattr(knn, "_PAIRS_AT_ONCE", 150 * 7)  # several blocks
    found = knn.votes(known, train.labels, queries, (k, 500), CLASSES, CPU)
    np.testing.assert_allclose(found[k], expected, atol=1e-4)
    assert found[500].shape == (40, CLASSES)  # all samples vote


def test_logistic_regression_equals_that_of_scikit_learn() -> None:
    train, test = blobs(200, 8.0), blobs(50, 8.0, seed=1)
    known, queries = train.of("cls+avg raw").copy(), test.of("cls+avg raw")
    known[:, 3] = 7.0  # a feature without variation
    labels = train.labels * 2  # classes 1, 3, 5, 7 have no samples
    mean, deviation = known.mean(0), known.std(0)
    deviation[3] = 1
    found = logistic.probabilities(known, labels, queries, (1.0, 1e-3, 0.1), 8, CPU)
    for strength in (1e-3, 0.1, 1.0):
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit((known - mean) / deviation, labels)
        expected = model.predict_proba((queries - mean) / deviation)
        np.testing.assert_allclose(found[strength][:, ::2], expected, atol=2e-4)
        assert not found[strength][:, 1::2].any()


@pytest.mark.parametrize("protocol", ["knn", "linear", "few_shot"])
def test_separable_features_are_told_apart_and_the_right_token_is_chosen(protocol: str) -> None:
    train, test = blobs(400, 0.1), blobs(100, 0.1, seed=1)
    for outcome in judged(protocol, train, test):
        assert accuracy(outcome.scores, test.labels) == 1.0
        assert outcome.chosen["feature"] == "cls raw"
        assert outcome.are_probabilities
        np.testing.assert_allclose(outcome.scores.sum(1), 1)
        assert outcome.fitted_on == (CLASSES * 5 if protocol == "few_shot" else 400)
    for outcome in judged(protocol, train, test, ("avg normed",)):
        assert accuracy(outcome.scores, test.labels) < 0.6  # this token is noise


@pytest.mark.parametrize("protocol", ["knn", "linear", "few_shot"])
def test_nothing_is_chosen_on_the_test_samples(protocol: str) -> None:
    """With other test labels, or other test samples, the choices and the scores of a sample stay the same."""
    train, test = blobs(200, 6.0), blobs(60, 6.0, seed=1)
    expected = judged(protocol, train, test)
    relabelled = judged(protocol, train, FeatureSet(test.values, (test.labels + 1) % CLASSES))
    fewer = judged(protocol, train, test.take(np.arange(10)))
    for whole, same, part in zip(expected, relabelled, fewer, strict=True):
        assert whole.chosen == same.chosen == part.chosen
        assert np.array_equal(whole.scores, same.scores)
        np.testing.assert_allclose(part.scores, whole.scores[:10], atol=1e-5)


def test_pixels_by_a_support_vector_machine() -> None:
    features = blobs(300, 0.5)
    pixels = np.clip(128 + 8 * features.of("cls raw"), 0, 255).astype(np.uint8)
    train, test = (FeatureSet(pixels[ids], features.labels[ids]) for ids in (np.arange(200), np.arange(200, 300)))
    assert train.is_pixels
    assert np.array_equal(train.of(PIXELS), pixels[:200] / np.float32(255))
    outcome = svm.judge(train, test, CLASSES + 1, 0)
    assert accuracy(outcome.scores, test.labels) > 0.97
    assert not outcome.are_probabilities
    assert (outcome.scores[:, CLASSES] < outcome.scores[:, :CLASSES].min(axis=1)).all()  # a class without samples
    two = train.take(np.flatnonzero(train.labels < 2))
    scores = svm.scores_of(two, test.of(PIXELS), 1.0, CLASSES)
    of_two = test.labels < 2
    assert accuracy(scores[of_two], test.labels[of_two]) > 0.97


@pytest.mark.parametrize(("samples", "held_out"), [(40, 4), (1000, 100), (100_000, 2000)])
def test_a_tenth_of_each_class_is_held_out(samples: int, held_out: int) -> None:
    labels = np.arange(samples) % CLASSES
    train = FeatureSet(np.zeros((samples, 2, 2), np.float32), labels)
    fit, chosen = split_off(train.labels, 0)
    assert np.array_equal(np.sort(np.concatenate([fit, chosen])), np.arange(samples))
    assert len(chosen) == held_out
    assert np.bincount(labels[chosen]).tolist() == [held_out // CLASSES] * CLASSES
    assert np.array_equal(chosen, split_off(train.labels, 0)[1])
    assert not np.array_equal(chosen, split_off(train.labels, 1)[1])
    alone = FeatureSet(train.values, np.where(np.arange(samples) == 5, CLASSES, labels))
    assert 5 in split_off(alone.labels, 0)[0]  # the only sample of its class is not held out


def test_of_many_classes_one_sample_each_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "_MOST_HELD_OUT", 10)
    labels = np.arange(120) % 30
    assert np.bincount(labels[split_off(labels, 0)[1]]).tolist() == [1] * 30


def test_a_class_without_training_samples_has_measures_by_the_support_vector_machine() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(36) % 6  # of 7 classes: the best five are measured as well
    train = FeatureSet(generator.integers(0, 256, (36, 4), dtype=np.uint8), labels)
    found = measures(svm.judge(train, train, 7, 0).scores, labels, are_probabilities=False)
    assert found["top1"] <= found["top5"] <= 1
    assert found["top5"] > 5 / 7


def test_a_limited_number_of_samples_has_each_class() -> None:
    order = np.random.default_rng(0).permutation(1000)
    labels = np.zeros(1000, np.int64)
    rare = order[[3, 400, 600, 999]]
    labels[rare] = [1, 2, 2, 3]
    chosen = limited(order, labels, 50)
    assert set(chosen) == {*order[:48], order[400], order[999]}
    assert np.array_equal(chosen, np.sort(chosen))
    assert set(limited(order, labels, 3)) == {order[0], order[3], order[400]}  # there are four classes
    for most in (1000, 2000):
        assert np.array_equal(limited(order, labels, most), np.arange(1000))


@pytest.mark.parametrize("most", [50, 200])
def test_with_each_class_among_them_the_first_samples_are_taken(most: int) -> None:
    generator = np.random.default_rng(1)
    labels, order = generator.integers(0, CLASSES, 300), generator.permutation(300)[:250]
    assert np.array_equal(limited(order, labels, most), np.sort(order[:most]))


def test_a_very_rare_class_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "_MOST_FITTED", 40)
    monkeypatch.setattr(linear, "_MOST_TO_CHOOSE_BY", 10)
    labels = np.repeat([0, 1], (500, 3))
    pixels = np.full((503, 4), 20, np.uint8) + 200 * labels[:, None].astype(np.uint8)
    train, test = FeatureSet(pixels, labels), FeatureSet(pixels[[0, 502]], np.array([0, 1]))
    for seed in range(3):
        machine = svm.judge(train, test, 2, seed)
        assert machine.fitted_on == 40
        for outcome in (machine, linear.judge(train, test, 2, seed, (PIXELS,), CPU)):
            assert accuracy(outcome.scores, test.labels) == 1


def test_few_shots_are_of_each_class_and_not_held_out() -> None:
    labels = np.arange(100) % CLASSES
    fit = np.arange(10, 100)
    first, second = (few_shot.choose(labels, fit, 3, 0, split) for split in (0, 1))
    for chosen in (first, second):
        assert np.bincount(labels[chosen]).tolist() == [3] * CLASSES
        assert set(chosen) <= set(fit)
    assert not np.array_equal(first, second)
    with pytest.raises(UserError, match=r"class 0 has 22 training samples .* needs 30 .*allowed: 1 to 22"):
        few_shot.choose(labels, fit, 30, 0, 0)


def test_the_support_vector_machine_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (90, 12)).astype(np.float32)
    labels = np.arange(90) % 3
    known, queries = FeatureSet(pixels[:60], labels[:60]), pixels[60:]
    model = SVC(C=10.0, break_ties=True).fit(known.of(PIXELS), known.labels)
    expected = model.decision_function(queries)
    np.testing.assert_allclose(svm.scores_of(known, queries, 10.0, 3), expected, rtol=1e-4, atol=1e-6)
