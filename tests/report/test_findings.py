"""Each sentence, on a run of which it is true, and its absence just beside its threshold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mae.report import evaluation_findings
from mae.report import findings as module
from mae.report.finding import Finding, NearestNeighbours
from mae.report.findings import findings
from mae.report.reading import read_run
from tests.report.runs import log, make_finetuning, make_run

FALLING = [1.4 / (1 + number) ** 0.4 for number in range(50)]


def found_in(path: Path, neighbours: NearestNeighbours | None = None) -> list[Finding]:
    return findings(replace(read_run(path), model=path / "model.safetensors"), neighbours)


def texts(found: list[Finding], *levels: str) -> str:
    return "\n".join(finding.text for finding in found if not levels or finding.level in levels)


def test_a_healthy_run_gets_calm_sentences(tmp_path: Path) -> None:
    make_run(tmp_path / "run", FALLING)
    found = found_in(tmp_path / "run")
    assert [finding.level for finding in found] == ["good", "good"]
    assert found[0].text == (
        "The loss is 0.298, 57 % below what needs no learning: predicting each patch's mean gives 0.730, and the mean "
        "target of each place 0.688."
    )
    assert found[1].text == "Nothing stands out: loss, speed and data look as they should."


@pytest.mark.parametrize(
    ("loss", "level", "sentence"),
    [
        (0.72, "problem", "The loss (0.720) is still above predicting each patch's mean (0.730): nothing has been"),
        (0.70, "warning", "but not below the mean target of each place (0.688)"),
        (0.60, "good", "13 % below what needs no learning"),
    ],
)
def test_the_loss_is_compared_with_what_needs_no_learning(
    tmp_path: Path, loss: float, level: str, sentence: str
) -> None:
    make_run(tmp_path / "run", [loss] * 50)
    assert sentence in texts(found_in(tmp_path / "run"), level)


def test_a_loss_that_has_not_fallen_yet_is_no_problem_during_the_warm_up(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [0.75] * 30)
    found = found_in(tmp_path / "run")
    assert "nothing has been learned yet" in texts(found, "note")
    assert "still warming up: it rises until epoch 40, and this is epoch 30" in texts(found, "note")


@pytest.mark.parametrize(("wait", "is_told"), [(0.38, True), (0.101, True), (0.099, False)])
def test_a_device_that_waits_for_data(tmp_path: Path, wait: float, is_told: bool) -> None:
    make_run(tmp_path / "run", FALLING, data_wait=wait)
    sentence = f"The device waited for data {100 * wait:.0f} % of the time: raise data.workers (now 4)"
    assert (sentence in texts(found_in(tmp_path / "run"), "warning")) == is_told


@pytest.mark.parametrize(("last", "is_told"), [(0.55, True), (0.505, False)])
def test_a_validation_loss_that_rises(tmp_path: Path, last: float, is_told: bool) -> None:
    folder = make_run(tmp_path / "run", FALLING)
    for epoch, loss in ((10, 0.6), (20, 0.5), (30, 0.51), (40, last)):
        log(folder, kind="evaluation", step=10 * epoch, epoch=float(epoch), loss=loss, samples=10, share_of_time=0.01)
    sentence = f"The validation loss rises: from 0.500 at epoch 20 to {last:.3f} at epoch 40"
    assert (sentence in texts(found_in(tmp_path / "run"), "warning")) == is_told


def test_a_fine_tuning_whose_validation_loss_rises(tmp_path: Path) -> None:
    make_finetuning(tmp_path / "run", [0.5, 0.8, 0.7, 0.6])
    assert "The validation loss rises: from 0.200 at epoch 2" in texts(found_in(tmp_path / "run"), "warning")


@pytest.mark.parametrize(("last", "is_told"), [(0.45, True), (0.48, False)])
def test_features_that_get_worse_while_the_loss_falls(tmp_path: Path, last: float, is_told: bool) -> None:
    folder = make_run(tmp_path / "run", FALLING)
    for epoch, knn in ((10, 0.4), (20, 0.5), (30, 0.49), (40, last)):
        record = {"epoch": float(epoch), "loss": 0.5, "samples": 900, "share_of_time": 0.01, "knn": knn}
        log(folder, kind="evaluation", step=10 * epoch, **record)
    sentence = f"k-NN accuracy falls: from 50 % at epoch 20 to {100 * last:.3g} % at epoch 40"
    assert (sentence in texts(found_in(tmp_path / "run"), "warning")) == is_told


def classifier(path: Path, accuracies: list[float], losses: list[float], **settings: Any) -> list[Finding]:
    """Findings about a classifier of ten classes with these accuracies, on 100 images, and training losses."""
    run = read_run(make_finetuning(path, accuracies).path)
    train = [record | {"loss": loss} for record, loss in zip(run.train, losses, strict=True)]
    evaluations = [record | {"loss": 0.5} for record in run.accuracies]
    changed = {"optim.warmup_epochs": 0.0} | {f"regularization.{name}": value for name, value in settings.items()}
    known = replace(run, train=train, accuracies=evaluations, classes=10, settings=run.settings | changed)
    return findings(replace(known, model=path / "best.safetensors"))


def test_a_classifier_that_gets_better_has_one_calm_sentence_more(tmp_path: Path) -> None:
    found = classifier(tmp_path / "run", [0.5, 0.6, 0.7, 0.8], [2.0, 1.0, 0.7, 0.6])
    assert texts(found).splitlines() == [
        "The best accuracy is 80 % at epoch 4, on 100 validation images; guessing one of 10 classes gives 10 %.",
        "Nothing stands out: loss, speed and data look as they should.",
    ]


@pytest.mark.parametrize(
    ("loss", "smoothing", "is_told"),
    [(0.02, 0.0, True), (0.08, 0.0, False), (0.52, 0.1, True), (0.58, 0.1, False)],
)
def test_a_classifier_that_knows_its_images_by_heart(
    tmp_path: Path, loss: float, smoothing: float, is_told: bool
) -> None:
    losses = [2.0, *[loss] * 5]
    found = classifier(tmp_path / "run", [0.5, 0.8, 0.8, 0.79, 0.8, 0.78], losses, label_smoothing=smoothing)
    sentence = (
        f"knows its training images by heart (training loss {loss:.3f}), and its accuracy on others has not risen"
    )
    assert (sentence in texts(found, "warning")) == is_told
    assert ("The accuracy has not risen since epoch 2 of 6." in texts(found, "note")) != is_told


def test_a_classifier_that_makes_no_mistake_on_its_validation_images(tmp_path: Path) -> None:
    found = classifier(tmp_path / "run", [0.9, 1.0, 1.0, 1.0, 1.0], [0.01] * 5)
    assert "All validation images are classified correctly since epoch 2 of 5" in texts(found, "note")
    assert "by heart" not in texts(found)


@pytest.mark.parametrize(("best", "is_told"), [(0.1, True), (0.19, True), (0.2, False)])
def test_a_classifier_that_guesses(tmp_path: Path, best: float, is_told: bool) -> None:
    found = classifier(tmp_path / "run", [0.1, 0.08, best], [2.3] * 3)
    sentence = "is that of guessing one of 10 classes (10 %): nothing has been learned yet"
    assert (sentence in texts(found, "problem")) == is_told
    assert ("The best accuracy is" in texts(found)) != is_told


def test_a_classifier_that_gives_all_images_the_same_class(tmp_path: Path) -> None:
    found = classifier(tmp_path / "run", [0.7] * 4, [0.9] * 4)
    assert "The accuracy is exactly 70 % in each of 4 evaluations" in texts(found, "problem")
    assert "same class" not in texts(classifier(tmp_path / "other", [0.7, 0.7, 0.7, 0.71], [0.9] * 4))


@pytest.mark.parametrize(("loss", "is_told"), [(2.3, True), (1.5, False)])
def test_a_fine_tuning_that_diverges(tmp_path: Path, loss: float, is_told: bool) -> None:
    losses = [2.3, 2.2, *[1.0] * 5, *[loss] * 5]
    found = classifier(tmp_path / "run", [0.5] * 11 + [0.6], losses)
    assert (
        f"The loss rose from 1.000 at epoch 3 to {loss:.3f}: training diverges" in texts(found, "problem")
    ) == is_told


@pytest.mark.parametrize(("last", "is_told"), [(0.9, True), (0.33, False)])
def test_a_run_that_diverges(tmp_path: Path, last: float, is_told: bool) -> None:
    make_run(tmp_path / "run", [*FALLING[:-5], *[last] * 5])
    text = texts(found_in(tmp_path / "run"), "problem")
    assert (f"to {last:.3f}: training diverges. Lower optim.base_lr" in text) == is_told


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [*FALLING[:-1], None], "error")
    found = found_in(tmp_path / "run")
    assert "The newest losses are not finite: training has broken down" in texts(found, "problem")
    assert "The run ended with an error after step 500 of 500: 500 steps" in texts(found, "problem")


def test_a_run_that_broke_down_in_its_warm_up_is_not_told_to_wait(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [*[1.2] * 5, 16.0, 828.0, 12456.6, 12456.6, None], "")
    folder.record_exit("error", "error: 10 steps in a row were skipped")
    text = texts(found_in(folder.path))
    assert "The run ended with an error after step 100 of 500: 10 steps in a row" in text
    assert "The loss rose from 1.200 at epoch 1 to 6,439: training diverges" in text
    assert "warming up" not in text
    assert "nothing has been learned" not in text


@pytest.mark.parametrize(("steps", "level"), [(range(7, 9), "note"), (range(7, 17), "warning")])
def test_skipped_steps(tmp_path: Path, steps: range, level: str) -> None:
    make_run(tmp_path / "run", FALLING).record_skipped({step: [1, 2] for step in steps})
    assert f"{len(steps)} steps were skipped, as loss or gradient was not finite (step 7, 8" in texts(
        found_in(tmp_path / "run"), level
    )


def test_how_a_run_ended(tmp_path: Path) -> None:
    make_run(tmp_path / "interrupted", FALLING[:45], "preempted")
    assert "The run is not finished; it was interrupted (450 steps)." in texts(found_in(tmp_path / "interrupted"))
    running = make_run(tmp_path / "running", FALLING[:45], "")
    assert "The run is going on after step 450 of 500." in texts(found_in(running.path))
    assert "it was killed after step 450 of 500" in texts(findings(read_run(running.path, is_running=False)), "warning")


@pytest.mark.parametrize(
    ("features", "level", "sentence"),
    [
        (0.841, "warning", "k-NN by the features (84.1 %) is below k-NN by plain pixels (85.5 %; k = 5, 10,000"),
        (0.853, "note", "is as good as by plain pixels"),
        (0.871, "good", "k-NN by the features (87.1 %) beats plain pixels (85.5 %; k = 5, 10,000 validation images)"),
    ],
)
def test_features_that_are_worse_than_pixels(tmp_path: Path, features: float, level: str, sentence: str) -> None:
    make_run(tmp_path / "run", FALLING)
    found = found_in(tmp_path / "run", NearestNeighbours(features, 0.855, 10_000, "k = 5"))
    assert sentence in texts(found, level)


def test_bad_images_and_a_lost_log(tmp_path: Path) -> None:
    make_run(tmp_path / "run", []).record_bad_samples(["a.tar: b.jpg (cut off)"])
    text = texts(found_in(tmp_path / "run"))
    assert "1 bad image was replaced by others, 0 are allowed" in text
    assert "The log of the training is lost, or training has not begun" in text


def test_the_thresholds_are_explained() -> None:
    source = Path(module.__file__).read_text() + Path(evaluation_findings.__file__).read_text()
    for name in (
        "NOTHING_LEARNED", "WAITING", "DIVERGING", "FEW_STEPS", "ERRORS_OF_PIXELS",
        "RISING", "NEAR_ZERO", "GUESSING", "FALLING", "STANDING",
    ):  # fmt: skip
        line: Any = source.split(f"\n{name} = ")[1].splitlines()[1]
        assert line.startswith('"""')
