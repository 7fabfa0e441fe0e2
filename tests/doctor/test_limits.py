"""What workers need of the machine."""

import resource
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.conftest import Doctor
from mae.data.plan import BatchPlan
from mae.doctor.limits import largest_micro_batch, open_files
from mae.errors import UserError


def test_too_little_shared_memory_is_a_problem_and_nothing_is_tried_p11(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = shutil.disk_usage
    # 2 workers, 2 batches each, of 16 images with 64 pixels, label, id and 16 numbers of noise: 9,216 bytes.
    for free, code in ((9216, 0), (9215, 2)):
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path, free=free: usual(path)._replace(free=free) if str(path) == "/dev/shm" else usual(path),
        )
        ended, found = doctor(*flags, "--data.workers", "2")
        assert ended == code
    assert found["shared memory"][0] == "problem"
    assert "--shm-size" in found["shared memory"][1]
    assert "--micro_batch_size 8" in found["shared memory"][1]
    assert found["step"] == ("unknown", "not examined, see shared memory")


def test_the_limit_of_open_files_is_held_against_shards_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = len(list(Path("/proc/self/fd").iterdir()))  # the tests before this one may have left some open
    soft, hard = now + 10, now + 200
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    assert f"{soft} are allowed, about " in open_files(shards=3, workers=0)
    with pytest.raises(UserError, match=r"raise the limit in the shell that starts the run: ulimit -n \d+$"):
        open_files(shards=3, workers=4)
    with pytest.raises(UserError, match=r"after root has raised the hard limit \d+: ulimit -n \d+$"):
        open_files(shards=3000, workers=0)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 64), st.integers(1, 4))
def test_the_largest_micro_batch_divides_and_fits(per_process: int, accumulation: int, most: int, unit: int) -> None:
    plan = BatchPlan(per_process * accumulation, 1, per_process, accumulation)
    found = largest_micro_batch(plan, most, unit)
    fitting = [n for n in range(1, most + 1) if plan.global_batch % n == 0 and n % unit == 0]
    assert found == (max(fitting) if fitting else None)
