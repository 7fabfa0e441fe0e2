"""kill -9 at random moments of saving: nothing that was acknowledged is lost, nothing is mixed, nothing is unusable."""

import itertools
import multiprocessing
import os
import random
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter
from training.checkpoints.samples import GROUPS, groups, names, run_position, write

NUMBERS = 100_000
"""In a tensor; a checkpoint of three takes 1.2 MB."""
KILLS, KILLS_OF_RANKS = 50, 6


def save_for_ever(root: Path, step: int, acknowledged: Path) -> None:
    """Save each step, and say so once it is on the disk."""
    writer = CheckpointWriter(root, keep=2)
    with acknowledged.open("ab", buffering=0) as file:
        for done in itertools.count(step):
            writer.save(groups(done, NUMBERS), {}, run_position(done))
            writer.wait()
            assert writer.failure is None
            file.write(b"%d\n" % done)


def save_parts_for_ever(root: Path, step: int, acknowledged: Path, rank: int, launch_id: str) -> None:
    """The same, where each of two ranks has half of every tensor."""
    distributed.init_process_group("gloo", init_method=f"file://{root.parent / launch_id}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def half(tensor: Tensor) -> DTensor:
        mine = tensor.chunk(2)[rank]
        return DTensor.from_local(mine, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())

    writer = CheckpointWriter(root, keep=2, rank=rank, writers=2, launch_id=launch_id)
    with acknowledged.open("ab", buffering=0) as file, suppress(RuntimeError):  # the other was killed
        for done in itertools.count(step):
            whole = groups(done, NUMBERS + 1)
            halves = {group: {name: half(tensor) for name, tensor in whole[group].items()} for group in GROUPS}
            writer.save(halves, {}, run_position(done))
            writer.wait()
            assert writer.failure is None
            if rank == 0:
                file.write(b"%d\n" % done)
            distributed.barrier()
    writer.close()


def started(*targets: tuple[Any, ...]) -> list[BaseProcess]:
    """Processes forked from here, which is the quickest of starts."""
    fork = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [fork.Process(target=target, args=rest) for target, *rest in targets]
    for process in processes:
        process.start()
    return processes


def last_acknowledged(path: Path) -> int:
    lines = path.read_bytes().split(b"\n")
    return int(lines[-2]) if len(lines) > 1 else 0


def require_whole(root: Path, acknowledged: Path) -> Checkpoint:
    promised = last_acknowledged(acknowledged)  # first: a rank that is alive goes on meanwhile
    found = newest_checkpoint(root, pytest.fail)
    assert found is not None
    assert found.step >= promised
    for group in GROUPS:
        (tensor,) = found.tensors(group).values()
        assert bool((tensor == found.step).all())
    assert found.run_position == run_position(found.step)
    return found


def wait_for_a_save(acknowledged: Path, before: int) -> None:
    give_up = time.monotonic() + 30
    while last_acknowledged(acknowledged) == before:
        assert time.monotonic() < give_up
        time.sleep(0.001)


def test_fifty_kills_at_random_moments_of_saving_c01(tmp_path: Path) -> None:
    root, acknowledged = tmp_path / "checkpoints", tmp_path / "acknowledged"
    acknowledged.touch()
    write(root, 1, tensors=groups(1, NUMBERS))
    chance, step, cut_short = random.Random(0), 1, 0
    for _ in range(KILLS):
        (process,) = started((save_for_ever, root, step + 1, acknowledged))
        wait_for_a_save(acknowledged, last_acknowledged(acknowledged))
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        cut_short += any(name.startswith(".tmp-") for name in names(root))
        found = require_whole(root, acknowledged)
        assert found.step > step
        step = found.step
    assert cut_short > KILLS / 5


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]], ids=["c02-rank-0", "c02-rank-1", "c01-c02-both"])
def test_kills_while_two_ranks_save_their_parts(victims: list[int], tmp_path: Path) -> None:
    root, acknowledged = tmp_path / "checkpoints", tmp_path / "acknowledged"
    acknowledged.touch()
    write(root, 1, tensors=groups(1, NUMBERS + 1))
    chance, step = random.Random(len(victims)), 1
    for number in range(KILLS_OF_RANKS):
        ranks = started(
            *((save_parts_for_ever, root, step + 1, acknowledged, rank, f"launch{number}") for rank in range(2))
        )
        wait_for_a_save(acknowledged, last_acknowledged(acknowledged))
        time.sleep(chance.uniform(0, 0.05))
        for rank in victims:
            os.kill(ranks[rank].pid or 0, 9)
        time.sleep(0.05)
        require_whole(root, acknowledged)
        for process in ranks:
            process.kill()
            process.join()
        found = require_whole(root, acknowledged)
        assert found.step > step
        step = found.step
