"""Memory of this process and of the control groups it is in."""

from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_own_process

from mae.training import memory
from mae.training.memory import forget_peak_memory, free_memory, give_back, memory_in_use, peak_memory, total_memory

CPU = torch.device("cpu")
BLOCK = 1 << 26
SLACK = 1 << 22  # the kernel counts by the processor, and adds up now and then


def test_a_block_shows_while_it_is_held_and_its_peak_until_that_is_forgotten() -> None:
    in_own_process(hold_a_block)


def hold_a_block() -> None:
    before = memory_in_use(CPU)
    block = mmap(-1, BLOCK)
    block.write(bytes(BLOCK))
    held = memory_in_use(CPU)
    assert held - before > BLOCK / 2
    block.close()
    assert memory_in_use(CPU) < held - BLOCK / 2
    assert peak_memory(CPU) > held - SLACK
    forget_peak_memory(CPU)
    assert peak_memory(CPU) < held - BLOCK / 2


def test_memory_that_was_freed_within_the_process_is_given_back() -> None:
    in_own_process(free_blocks)


def free_blocks() -> None:
    np.ones(1 << 24, dtype=np.uint8)  # from now on blocks of this size come from the heap
    before = memory_in_use(CPU)
    blocks = [np.ones(1 << 20, dtype=np.uint8) for _ in range(128)]
    del blocks[::2]  # between blocks that stay, which keeps the heap from shrinking
    assert memory_in_use(CPU) - before > 1.5 * BLOCK
    give_back(CPU)
    assert memory_in_use(CPU) - before < 1.5 * BLOCK


def test_there_is_no_more_free_than_in_all() -> None:
    assert 0 < free_memory(CPU) < total_memory(CPU)


@pytest.mark.parametrize(
    ("group", "files"),
    [
        pytest.param(
            "0::/slurm/job/step",
            {
                "slurm/memory.max": "3000",
                "slurm/memory.current": "2500",
                "slurm/memory.stat": "anon 1\ninactive_file 700\n",
                "slurm/job/memory.max": "2000",
                "slurm/job/memory.current": "900",
                "slurm/job/memory.stat": "inactive_file 0\n",
                "slurm/job/step/memory.max": "max",
            },
            id="version-2",
        ),
        pytest.param(
            "7:cpuset:/\n4:memory:/docker/abc\n0::/",
            {  # within the container the folder of the group is the root
                "memory/memory.limit_in_bytes": "2000",
                "memory/memory.usage_in_bytes": "1200",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
            },
            id="version-1",
        ),
    ],
)
def test_the_least_limit_of_all_control_groups_counts_and_cached_files_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str]
) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path / "groups")
    (tmp_path / "cgroup").write_text(f"{group}\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert total_memory(CPU) == 2000
    assert free_memory(CPU) == 1100


def test_a_kernel_without_control_groups_has_the_limits_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    assert total_memory(CPU) == 9000 * 1024
    assert free_memory(CPU) == 8000 * 1024
