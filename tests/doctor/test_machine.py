"""What the doctor says of libraries, devices and cores."""

import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from doctor.conftest import Doctor
from mae.doctor import machine, places
from mae.doctor.places import broken_link, missing_mounts, nearest_folder


@pytest.mark.parametrize(
    ("name", "found", "told"),
    [
        ("torch", "2.13.0", r"torch is 2\.13\.0, but \S+ is needed: pip install 'torch"),
        ("torch", "2.13.0+cpu", r"torch is 2\.13\.0\+cpu, but \S+ is needed: pip install 'torch"),
        ("timm", "0.9.2", r"timm is 0\.9\.2, but (>=1\.[\d.]+) is needed: pip install 'timm\1'"),
    ],
)
def test_libraries_that_are_too_old_or_known_to_fail_are_a_problem(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch, name: str, found: str, told: str
) -> None:
    monkeypatch.setattr(machine, "installed", lambda asked: found if asked == name else metadata.version(asked))
    code, lines = doctor(*flags)
    assert code == 2
    assert lines["versions"][0] == "problem"
    assert re.search(told, lines["versions"][1])


def test_newer_libraries_are_welcome(doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed", lambda asked: "9999.0.dev1+cu999")
    assert doctor(*flags)[1]["versions"][0] == "ok"


def test_a_gpu_that_torch_cannot_use_is_a_problem_k09(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_driver", lambda: "580.82.07")
    code, found = doctor(*flags)
    assert code == 2
    assert "there is an NVIDIA driver, 580.82.07, but torch" in found["devices"][1]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert doctor(*flags)[1]["devices"][0] == "ok"


def test_more_threads_than_cores_are_a_warning(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae.doctor.examination.default_workers", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    verdict, text = doctor(*flags, "--processes", "2", "--data.workers", "3", "--data.threads", "2")[1]["processors"]
    assert verdict == "warning"
    assert "12 threads decode on 4 cores: set --data.workers 1" in text
    assert "8 threads compute on 4 cores: set OMP_NUM_THREADS=2" in text


def test_a_busy_machine_is_a_warning(doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for load, verdict in ((0.0, "ok"), (99.5, "warning")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert doctor(*flags)[1]["processors"][0] == verdict


def test_a_disk_that_is_not_mounted_is_told_c14(tmp_path: Path) -> None:
    table = tmp_path / "fstab"
    table.write_text(f"# a disk\n/dev/sdb1 {tmp_path}/disk ext4 defaults 0 2\n/dev/sda1 / ext4 defaults 0 1\n")
    assert list(missing_mounts(tmp_path / "disk" / "runs" / "a", table)) == [tmp_path / "disk"]
    assert list(missing_mounts(tmp_path / "other", table)) == []
    assert list(missing_mounts(tmp_path, tmp_path / "none")) == []


def test_the_nearest_folder_and_broken_links(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path.resolve()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert broken_link(tmp_path / "link" / "a") == tmp_path / "link"
    (tmp_path / "gone").mkdir()
    assert places.broken_link(tmp_path / "link" / "a") is None
