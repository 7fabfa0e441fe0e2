"""Two processes that torchrun starts: the batches of one, every sample evaluated once, one message of a mistake."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import write_shards

from mae.evaluation.settings import EvaluateSettings
from mae.pipelines import evaluate, finetune, pretrain
from mae.settings import parse
from mae.training.run_folder.folder import RunFolder
from pipelines import test_finetune, test_pretrain
from pipelines.test_pretrain import ROOT, TORCHRUN, consumed, damage_first_image, launch, losses

UNTRAINED = ["--optim.base_lr", "1e-30", "--epochs", "0.3", "--optim.warmup_epochs", "0"]


@dataclass
class Launched:
    """What became of all commands, which one launcher started."""

    folder: Path
    exit_code: int
    errors: str
    """Of the launcher, and of the last command, in which a bad image is met."""

    def errors_of(self, command: int) -> str:
        return "".join((self.folder / f"{command}-{rank}.txt").read_text() for rank in range(2))

    def exit_codes_of(self, command: int) -> list[int]:
        return [int((self.folder / f"{command}-{rank}.code").read_text()) for rank in range(2)]


def judged(run: Path, shards: Path, held_out: Path) -> list[str]:
    """Arguments of `mae evaluate`; the test images are also among the training images."""
    sets = ["--data.shards", str(shards), "--eval_shards", str(held_out), "--eval_overlap", "1"]
    return [str(run), *sets, "--protocols", "knn", "linear", "few_shot", "pixels", "untrained", "--shots", "2"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("launched")
    shards, damaged = write_shards(folder / "shards", [13, 12]), write_shards(folder / "damaged", [13, 12])
    damage_first_image(damaged / "train-000001.tar")
    held_out = write_shards(folder / "held-out", [7, 4])

    others = write_shards(folder / "others", [7, 4], size=(9, 9))
    online = ["--evaluation.eval_shards", str(others / "*.tar"), "--evaluation.every", "2"]

    def command(stage: str, data: Path, name: str, *flags: str) -> list[str]:
        tiny = test_pretrain.TINY if stage == "pretrain" else test_finetune.TINY
        places = ["--data.shards", str(data / "*.tar"), "--run_dir", str(folder / name)]
        return [str(ROOT / "pipelines" / f"{stage}.py"), *tiny, *places, *flags]

    commands = [
        command(
            "pretrain",
            shards,
            "pretrained",
            "--record_samples",
            "True",
            "--activation_checkpointing",
            "blocks",
            *online,
        ),
        command(
            "finetune", shards, "tuned", "--eval_shards", str(held_out / "*.tar"), "--eval_overlap", "1", *UNTRAINED
        ),
        [str(ROOT / "pipelines" / "evaluate.py"), *judged(folder / "pretrained", shards, held_out), "--out", "judged"],
        command("pretrain", shards, "mistaken", "--batch_size", "7"),
        command("pretrain", damaged, "stopped", "--data.mean", "0.5", "--data.std", "0.2"),
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = launch(
        [*TORCHRUN, str(Path(__file__).with_name("several.py")), str(folder / "commands.json")],
        folder,
        ACCELERATE_USE_CPU="true",
        XDG_CACHE_HOME=str(folder / "cache"),
    )
    return Launched(folder, done.returncode, done.stderr)


def test_two_processes_run_the_same_global_batches_o09(
    launched: Launched, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards([13, 12])
    one = pretrain.run(test_pretrain.settings(shards, tmp_path / "one", "--record_samples", "True"))
    two = launched.folder / "pretrained"
    assert launched.exit_codes_of(0) == [0, 0], launched.errors_of(0)
    # DDP would copy each gradient once more.
    assert "strides" not in launched.errors_of(0)
    assert len(list(two.glob("samples-rank*.jsonl"))) == 2
    assert consumed(two) == consumed(one.path)
    assert losses(two) == pytest.approx(losses(one.path), rel=1e-5)


def test_two_processes_judge_features_as_one_does(launched: Launched, tmp_path: Path) -> None:
    assert launched.exit_codes_of(2) == [0, 0], launched.errors_of(2)
    words = judged(*(launched.folder / name for name in ("pretrained", "shards", "held-out")))
    one = evaluate.run(parse(EvaluateSettings, [*words, "--out", str(tmp_path / "out")], prog="mae evaluate"))
    two = json.loads((launched.folder / "judged" / "results.json").read_text())["rows"]
    assert two == json.loads(json.dumps([row.to_json() for row in one]))


def test_two_processes_evaluate_every_sample_once(
    launched: Launched, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    """Eleven samples do not divide by two processes; a run that learns nothing must give equal figures."""
    shards, held_out = make_shards([13, 12]), make_shards([7, 4], name="held-out")
    one = finetune.run(test_finetune.settings(shards, held_out, tmp_path / "one", *UNTRAINED))
    assert launched.exit_codes_of(1) == [0, 0], launched.errors_of(1)
    expected = [record for record in one.metrics() if record["kind"] == "eval"]
    found = [record for record in RunFolder(launched.folder / "tuned").metrics() if record["kind"] == "eval"]
    assert [record["samples"] for record in found] == [11]
    assert found[0]["accuracy"] == expected[0]["accuracy"]
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)


def test_two_processes_evaluate_as_one_while_pretraining(
    launched: Launched, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards, others = make_shards([13, 12]), make_shards([7, 4], name="others", size=(9, 9))
    flags = ["--evaluation.eval_shards", str(others / "*.tar"), "--evaluation.every", "2"]
    one = pretrain.run(test_pretrain.settings(shards, tmp_path / "one", *flags))
    expected = [record for record in one.metrics() if record["kind"] == "evaluation"]
    found = [record for record in RunFolder(launched.folder / "pretrained").metrics() if record["kind"] == "evaluation"]
    assert [record["samples"] for record in found] == [11, 11]
    for name in ("step", "loss", "rank"):
        assert [each[name] for each in found] == pytest.approx([each[name] for each in expected], rel=1e-4)


def test_with_two_processes_a_mistake_is_one_message(launched: Launched) -> None:
    assert 0 not in launched.exit_codes_of(3)
    said = launched.errors_of(3).splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert errors == ["error: batch_size 7 cannot be divided among 2 processes; nearest that can: 6 or 8"]
    assert not (launched.folder / "mistaken").exists()
    assert not [line for line in said if str(ROOT / "mae") in line and "File" in line], "a traceback of ours"


def test_with_two_processes_a_bad_image_of_one_is_one_message_of_all(launched: Launched) -> None:
    assert launched.exit_code != 0
    said = launched.errors.splitlines()
    (error,) = [line for line in said if line.startswith("error: ")]
    assert error.startswith("error: 1 bad image, 0 are allowed (data.max_bad_samples): ")
    assert "000013.png" in error
    assert not [line for line in said if str(ROOT / "mae") in line and "File" in line], "a traceback of ours"
