"""Pretraining with every weight in parts: started by the shipped preset, on two processes of the CPU."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae.pipelines import finetune
from mae.pipelines.pretrain import run
from mae.settings import parse
from pipelines import test_finetune
from pipelines.test_pretrain import ROOT, STEPS, TINY, consumed, launch, losses, settings

FLAGS = ["--record_samples", "True", "--ema_decay", "0.5", "--picture_every", "6"]
PRESET = ROOT / "configs" / "accelerate" / "fsdp2.yaml"


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([13, 12])


def sharded_run(shards: Path, run_dir: Path, *flags: str) -> Path:
    places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(run_dir)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PRESET), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "pipelines" / "pretrain.py"), *TINY, *places, *FLAGS, *flags]
    done = launch(command, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_sharded_run_is_that_of_one_process_and_goes_on_as_one_c18(
    shards: Path, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    one = run(settings(shards, tmp_path / "one", *FLAGS))
    others = make_shards([7, 4], name="others", size=(9, 9))
    online = ["--evaluation.eval_shards", str(others / "*.tar"), "--evaluation.every", "2"]
    two = sharded_run(shards, tmp_path / "two", "--activation_checkpointing", "blocks", *online)
    assert consumed(two) == consumed(one.path)
    assert losses(two) == pytest.approx(losses(one.path), rel=1e-5)
    assert {path.name for path in (two / "pictures").iterdir()} == {path.name for path in one.pictures.iterdir()}
    expected, found = load_file(one.model), load_file(two / "model.safetensors")
    assert found.keys() == expected.keys()
    # The bias of the keys has no true gradient, only rounding errors, which Adam makes as large as any other.
    compared = [name for name in expected if not name.endswith("attn.qkv.bias")]
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in compared)

    # The last checkpoint but one is left, in parts; one process takes it up.
    parts = two / "checkpoints" / "step-000000012"
    assert len(list(parts.glob("*-of-00002.safetensors"))) == 6
    (two / "model.safetensors").unlink()
    shutil.rmtree(two / "checkpoints" / f"step-{STEPS:09d}")
    finished = run(settings(shards, two, *FLAGS))
    assert losses(two) == pytest.approx(losses(one.path), rel=1e-5)
    assert (finished.checkpoints / f"step-{STEPS:09d}" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_sharded_run_may_be_compiled(shards: Path, tmp_path: Path) -> None:
    one = run(settings(shards, tmp_path / "one", *FLAGS))
    two = sharded_run(shards, tmp_path / "two", "--compile", "True", "--activation_checkpointing", "blocks")
    assert losses(two) == pytest.approx(losses(one.path), rel=1e-5)


@pytest.mark.slow
def test_a_sharded_fine_tuning_is_evaluated_and_keeps_its_best_model(
    shards: Path, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    held_out = make_shards([7, 4], name="held-out")
    words = [*test_finetune.TINY, "--data.shards", str(shards), "--eval_shards", str(held_out), "--eval_overlap", "1"]
    words += ["--pool", "avg", "--freeze", "blocks:1", "--augment.erase", "0.25"]
    # Drop path, mixup and cutmix are keyed by process.
    words += ["--regularization.drop_path", "0", "--regularization.mixup", "0", "--regularization.cutmix", "0"]
    one = finetune.run(parse(finetune.FinetuneSettings, [*words, "--run_dir", str(tmp_path / "one")], "mae finetune"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PRESET), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "pipelines" / "finetune.py"), *words]
    done = launch([*command, "--run_dir", str(tmp_path / "two")], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one.path), rel=1e-4)
    for name in ("best.safetensors", "model.safetensors"):
        expected, found = load_file(one.path / name), load_file(tmp_path / "two" / name)
        assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in expected.items()}
