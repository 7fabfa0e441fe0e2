"""Each sentence, on a run of which it is true, and its absence just beside its threshold."""

from pathlib import Path
from typing import Any

import pytest

from mae.report import findings as module
from mae.report.findings import Finding, NearestNeighbours, findings
from mae.report.reading import read_run
from tests.report.runs import log, make_finetuning, make_run

FALLING = [1.4 / (1 + number) ** 0.4 for number in range(50)]


def found_in(path: Path, neighbours: NearestNeighbours | None = None) -> list[Finding]:
    return findings(read_run(path), neighbours)


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
    source = Path(module.__file__).read_text()
    for name in ("NOTHING_LEARNED", "WAITING", "RISING", "DIVERGING", "FEW_STEPS", "ERRORS_OF_PIXELS"):
        line: Any = source.split(f"\n{name} = ")[1].splitlines()[1]
        assert line.startswith('"""')
