"""Any plug may be pulled at any moment: the same command ends with the same weights, for both stages."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from mae.pipelines import finetune, pretrain
from mae.settings import parse

MODEL = ["--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--model.patch_size", "2"]
SHARED = [
    *MODEL, "--data.image_size", "8", "--data.channels", "1", "--batch_size", "8", "--log_every", "1",
    "--epochs", "30", "--checkpoint_every", "7", "--ema_decay", "0.9", "--optim.warmup_epochs", "1",
]  # fmt: skip
PRETRAIN = [
    *SHARED, "--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2",
    "--picture_every", "40", "--picture_images", "2",
]  # fmt: skip
# Everything that draws numbers by itself is on.
FINETUNE = [*SHARED, "--regularization.drop_path", "0.3", "--augment.rand_augment", "5", "--eval_every", "8"]
STEPS = 94  # ceil(25 samples * 30 epochs / 8)


def on_rank(rank: int, world: int, port: int, work: Callable[[], Any]) -> None:
    """Be one process of a job, as torchrun would start it."""
    warnings.resetwarnings()  # a test makes errors of them, a run does not
    if world > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    work()
    PartialState().destroy_process_group()


def start(world: int, work: Callable[[], Any]) -> list[ForkProcess]:
    """All processes of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=on_rank, args=(rank, world, port, work)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks: list[ForkProcess]) -> None:
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_after(ranks: list[ForkProcess], run_dir: Path, step: int, moment: float) -> None:
    """SIGKILL to every rank, some time after the log shows `step`."""
    deadline = time.time() + 60
    while max((record["step"] for record in records(run_dir)), default=0) < step:
        assert time.time() < deadline
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.002)
    time.sleep(moment)
    for rank in ranks:
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join()


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    """All that is logged but times."""
    timing = ("images_per_second", "step_seconds", "data_wait", "tflops", "peak_memory", "seconds")
    return [tuple(value for name, value in record.items() if name not in timing) for record in records(run_dir)]


# The quick ones have each stage and each number of processes; the slow ones are all that is left to pair.
@pytest.mark.parametrize(
    ("stage", "world"),
    [
        ("pretrain", 1),
        ("finetune", 2),
        pytest.param("pretrain", 2, marks=pytest.mark.slow),
        pytest.param("finetune", 1, marks=pytest.mark.slow),
    ],
)
def test_three_kills_with_other_workers_each_time_change_no_bit_o04_o08_p14(
    stage: str, world: int, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards, held_out = make_shards([13, 12]), make_shards([7, 4], name="held-out")

    def train(run_dir: Path, workers: int) -> Any:
        places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(run_dir), "--data.workers", str(workers)]
        if stage == "pretrain":
            return pretrain.run(parse(pretrain.PretrainSettings, [*PRETRAIN, *places], "mae pretrain"))
        places += ["--eval_shards", str(held_out / "*.tar"), "--eval_overlap", "1"]
        return finetune.run(parse(finetune.FinetuneSettings, [*FINETUNE, *places], "mae finetune"))

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    finish(start(world, lambda: train(straight, 0)))
    moments = random.Random(f"{stage} {world}")
    for workers, step in ((0, 12), (2, 35), (1, 60)):
        kill_after(start(world, lambda count=workers: train(cut, count)), cut, step, moments.random() / 20)  # type: ignore[misc]
    finish(start(world, lambda: train(cut, 0)))

    assert trace(cut) == trace(straight)
    names = ["model.safetensors"] + (["best.safetensors"] if stage == "finetune" else [])
    for name in names:
        expected, found = load_file(straight / name), load_file(cut / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[tensor], found[tensor]) for tensor in expected)
    last = f"checkpoints/step-{STEPS:09d}"
    notes = [json.loads((run_dir / last / "manifest.json").read_text())["notes"] for run_dir in (straight, cut)]
    assert notes[0] == notes[1]
    assert ("best" in notes[0]["pipeline"]) == (stage == "finetune")
    assert not list(cut.glob("checkpoints/.*"))
