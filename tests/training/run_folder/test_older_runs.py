"""Runs that an older version began, resumed by this one: see fixtures/README.md."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mae.errors import UserError
from mae.pipelines import finetune, pretrain
from mae.settings import parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.checkpoints.manifest import FORMAT_VERSION

FIXTURE = Path(__file__).parent / "fixtures" / "format-2"
STAGES: dict[str, tuple[Any, Any]] = {
    "pretrain": (PretrainSettings, pretrain.run),
    "finetune": (FinetuneSettings, finetune.run),
}


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def resume(stage: str, *flags: str) -> None:
    schema, run = STAGES[stage]
    run(parse(schema, ["--config", f"{stage}/settings.yaml", *flags], prog=f"mae {stage}"))


def log(stage: str, folder: Path = Path()) -> dict[tuple[str, int], tuple[float, ...]]:
    """Losses, gradient norms and accuracies by kind and step."""
    records = map(json.loads, (folder / stage / "metrics.jsonl").read_text().splitlines())
    names = ("lr", "loss", "grad_norm", "accuracy")
    return {(each["kind"], each["step"]): tuple(each[name] for name in names if name in each) for each in records}


def assert_as_before(stage: str, kinds: tuple[str, ...] = ("train", "eval")) -> None:
    before = {key: figures for key, figures in log(stage, FIXTURE).items() if key[0] in kinds}
    after = {key: figures for key, figures in log(stage).items() if key[0] in kinds}
    assert [key for key in after if key[0] == "train"] == [("train", step) for step in range(1, 11)]
    assert after.keys() == before.keys()
    for key, figures in after.items():
        assert figures == pytest.approx(before[key], rel=1e-5), key  # versions of torch round differently


@pytest.mark.parametrize("stage", STAGES)
def test_an_older_run_is_resumed_and_its_next_checkpoint_is_of_this_format(
    stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    resume(stage)
    assert "4 of 10 steps are done" in capfd.readouterr().out
    assert_as_before(stage)
    manifest = json.loads(Path(stage, "checkpoints", "step-000000008", "manifest.json").read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["settings"]["optim.base_lr"] == 0.05
    assert "run_dir" not in manifest["settings"]
    assert manifest["settings"].get("model.mask_version", 1) == 1


def test_what_changes_no_weight_may_change_in_an_older_pretraining() -> None:
    resume("pretrain", "--picture_images", "4", "--picture_every", "3", "--skip_at_most", "20", "--data.threads", "2")
    assert_as_before("pretrain")
    assert sorted(Path("pretrain/pictures").glob("*.png"))


def test_what_changes_no_weight_may_change_in_an_older_fine_tuning() -> None:
    resume("finetune", "--eval_every", "0.5", "--skip_at_most", "20")
    assert_as_before("finetune", kinds=("train",))
    evaluated = [step for kind, step in log("finetune") if kind == "eval"]
    assert evaluated == [3, 5, 7, 8, 9, 10][-len(evaluated) :]
    assert 7 in evaluated


@pytest.mark.parametrize("stage", STAGES)
def test_what_changes_weights_is_refused_by_name_in_an_older_run(stage: str) -> None:
    with pytest.raises(UserError, match=r"holds a run with other settings: seed was 0, is 1; augment.flip was True"):
        resume(stage, "--seed", "1", "--augment.flip", "False", "--log_every", "2")


@pytest.mark.parametrize("stage", STAGES)
def test_a_removed_setting_is_passed_over_at_its_last_default_and_named_otherwise(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, run = STAGES[stage]
    monkeypatch.setattr(schema, "REMOVED", {"optim.amsgrad": False, "old.size": [3]})
    saved = Path(stage, "settings.yaml")
    settings = parse(schema, ["--config", str(saved)], prog="mae")
    text = saved.read_text()
    saved.write_text(text.replace("optim:\n", "optim:\n  amsgrad: true\n") + "old: {size: [3]}\n")
    with pytest.raises(UserError, match=r"settings: optim.amsgrad was True, is False since it was removed; start it"):
        run(settings)
    with pytest.raises(UserError, match=r"optim.amsgrad is True; allowed: False, since this setting was removed"):
        resume(stage)
    saved.write_text(text.replace("optim:\n", "optim:\n  amsgrad: false\n") + "old: {size: [3]}\n")
    resume(stage)
    assert_as_before(stage)


def test_a_magnitude_of_rand_augment_is_saved_in_older_runs_and_checkpoints() -> None:
    """As a number, torchvision's; the same run is resumed, and another RandAugment is refused by its name of today."""
    for saved in Path("finetune").rglob("*"):
        if saved.suffix in (".yaml", ".json"):
            text = saved.read_text()
            saved.write_text(re.sub(r'(rand_augment"?): 0', r"\1: 9", text))
    with pytest.raises(UserError, match=r"augment.rand_augment was torchvision-9, is torchvision-8;"):
        resume("finetune", "--augment.rand_augment", "torchvision-8")
    resume("finetune", "--augment.rand_augment", "torchvision-9")
    before, after = log("finetune", FIXTURE), log("finetune")
    assert [before[key] == pytest.approx(after[key], rel=1e-5) for key in (("train", 4), ("train", 5))] == [True, False]


def test_a_setting_that_no_version_has_had_is_refused() -> None:
    saved = Path("pretrain", "settings.yaml")
    settings = parse(PretrainSettings, ["--config", str(saved)], prog="mae")
    saved.write_text(saved.read_text() + "colour: red\n")
    with pytest.raises(UserError, match=r"colour was red, is \(not set\)"):
        pretrain.run(settings)
    with pytest.raises(UserError, match=r"unknown setting 'colour'"):
        resume("pretrain")


def test_a_checkpoint_of_other_settings_is_refused_by_name() -> None:
    """Such as one that was copied into another run."""
    resume("pretrain")
    saved = Path("pretrain", "settings.yaml")
    saved.write_text(saved.read_text().replace("weight_decay: 0.05", "weight_decay: 0.5"))
    with pytest.raises(UserError, match=r"step-000000010 was made with other .*optim.weight_decay was 0.05, is 0.5;"):
        resume("pretrain")
