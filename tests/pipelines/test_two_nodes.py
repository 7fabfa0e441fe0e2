"""Two machines train one model: straight, with a rank killed, with a machine gone and back, with the cable pulled."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mae.pipelines.pretrain import run
from pipelines.namespaces import Node, two_nodes, why_not
from pipelines.test_pretrain import TINY, losses, settings

SCRIPT = Path(__file__).parent.parent.parent / "pipelines" / "pretrain.py"
STEPS = 150
FLAGS = ["--epochs", "48", "--checkpoint_every", "10", "--record_samples", "True"]
# One launch takes some ten seconds on two cores, most of it imports.
PATIENCE = 120.0

pytestmark = pytest.mark.slow


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([13, 12])


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_nodes(tmp_path) as both:
        yield both


def start(node: Node, shards: Path, run_dir: Path, *flags: str, restarts: int = 0) -> None:
    places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(run_dir)]
    node.launch(SCRIPT, [*TINY, *FLAGS, *places, *flags], restarts)


def wait_for_step(step: int, run_dir: Path) -> None:
    """Until a checkpoint of `step` or later is there."""
    deadline = time.monotonic() + PATIENCE
    while not any(int(path.name[5:]) >= step for path in (run_dir / "checkpoints").glob("step-?????????")):
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.02)


def samples(run_dir: Path) -> list[list[int]]:
    """Sample ids of every step over all ranks; what a rank took last for a step is what counts."""
    taken: dict[int, list[int]] = {}
    for path in run_dir.glob("samples-rank*.jsonl"):
        records = map(json.loads, path.read_text().splitlines())
        for step, ids in {record["step"]: record["ids"] for record in records}.items():
            taken.setdefault(step, []).extend(ids)
    return [sorted(taken[step]) for step in range(STEPS)]


def require_a_straight_run(shards: Path, run_dir: Path) -> None:
    """One process, never disturbed, takes the same samples and has the same losses."""
    straight = run(settings(shards, run_dir.with_name("straight"), *FLAGS))
    assert samples(run_dir) == samples(straight.path)
    assert len(losses(run_dir)) == STEPS
    assert losses(run_dir) == pytest.approx(losses(straight.path), rel=1e-5)


def test_two_nodes_run_the_batches_of_one_process(nodes: tuple[Node, Node], shards: Path, tmp_path: Path) -> None:
    for node in nodes:
        start(node, shards, tmp_path / "run")
    for node in nodes:
        assert node.exit_code(PATIENCE) == 0, node.output()
    require_a_straight_run(shards, tmp_path / "run")


def test_a_rank_killed_and_a_node_lost_and_back_change_nothing_r02(
    nodes: tuple[Node, Node], shards: Path, tmp_path: Path
) -> None:
    for node in nodes:
        start(node, shards, tmp_path / "run", restarts=3)
    wait_for_step(20, tmp_path / "run")
    (rank,) = nodes[1].ranks(SCRIPT)
    os.kill(rank, signal.SIGKILL)

    wait_for_step(80, tmp_path / "run")
    nodes[1].kill()
    start(nodes[1], shards, tmp_path / "run", restarts=3)
    for node in nodes:
        assert node.exit_code(PATIENCE) == 0, node.output()
    require_a_straight_run(shards, tmp_path / "run")


def test_a_cable_pulled_ends_both_sides_and_the_same_command_goes_on(
    nodes: tuple[Node, Node], shards: Path, tmp_path: Path
) -> None:
    for node in nodes:
        start(node, shards, tmp_path / "run", "--timeout", "10")
    wait_for_step(30, tmp_path / "run")
    nodes[1].set_link(False)
    for node in nodes:
        node.wait_until_no_rank_runs(SCRIPT, seconds=40)
        said = [line for line in node.output().splitlines() if "error: rank " in line]
        assert len(said) == 1, node.output()
        node.kill()  # torchrun itself waits minutes for a meeting point that it cannot reach
    nodes[1].set_link(True)

    for node in nodes:
        start(node, shards, tmp_path / "run", "--timeout", "10")
    for node in nodes:
        assert node.exit_code(PATIENCE) == 0, node.output()
    require_a_straight_run(shards, tmp_path / "run")
