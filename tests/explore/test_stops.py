"""Which models of a run can be looked at."""

from pathlib import Path

import pytest

from mae.errors import UserError
from mae.explore.models import RunModels
from mae.explore.stops import Stop, stops_of
from tests.explore.runs import autoencoder, models_of, write_autoencoder, write_classifier, write_run


def test_checkpoints_come_by_step_then_the_last_model_then_the_best(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (1_000, 20, 3))
    (run / "best.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    for name in (".step-000000004.tmp", "step-000000004.replaced", "notes"):
        (run / "checkpoints" / name).mkdir()
    found = stops_of(run)
    names = ["step 3", "step 20", "step 1,000", "end of the run", "best on the evaluation shards"]
    assert [stop.name for stop in found] == names
    assert [stop.path.name for stop in found[2:]] == ["step-000001000", "model.safetensors", "best.safetensors"]


def test_a_run_that_goes_on_has_its_checkpoints_and_anything_else_is_one_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "model.safetensors").unlink()
    assert [stop.name for stop in stops_of(run)] == ["step 10", "step 20"]
    checkpoint = run / "checkpoints" / "step-000000010"
    assert stops_of(checkpoint)[0].name == "end of the run"  # a folder with a model, whatever it is called
    assert stops_of(checkpoint / "model.safetensors") == [Stop("model.safetensors", checkpoint / "model.safetensors")]


def test_a_run_that_has_written_no_model_yet_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "settings.yaml").write_text("epochs: 1\n")
    with pytest.raises(UserError, match=r"run holds no model\.safetensors; give the folder of a finished run"):
        models_of(tmp_path / "run")
    with pytest.raises(UserError, match="gone does not exist"):
        models_of(tmp_path / "gone")


def test_a_damaged_last_model_is_named_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    cut = (run / "model.safetensors").read_bytes()[:-100]
    (run / "model.safetensors").write_bytes(cut)
    models = models_of(run)
    assert models.stops[models.last].name == "step 20"
    assert "a model of the run cannot be shown" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"model\.safetensors"), models.use(2):
        pass
    with models.use(0) as model:
        assert model.path.parent.name == "step-000000010"


def test_a_model_of_other_images_and_one_of_no_known_version_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (10,))
    write_autoencoder(run / "checkpoints" / "step-000000005", autoencoder(5, (4, 12)), (4, 12))
    models = models_of(run)
    with pytest.raises(UserError, match="takes other images than the last model of the run"), models.use(0):
        pass
    for wrong in (-1, 3):
        with pytest.raises(UserError, match="there is no checkpoint"), models.use(wrong):
            pass
    tuned = write_classifier(tmp_path / "tuned") / "model.safetensors"
    tuned.write_bytes(tuned.read_bytes().replace(b'\\"classifier\\"', b'\\"clustering\\"'))
    with pytest.raises(UserError, match="in a way this version of mae does not know"):
        RunModels(stops_of(tuned))
