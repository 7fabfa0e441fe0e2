"""What the doctor says of disk space and a folder in use."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from doctor.conftest import TINY, TINY_DECODER, Doctor
from mae.doctor.stages import PretrainExamination
from mae.pipelines import pretrain
from mae.training.checkpoints.room import checkpoint_bytes


def test_too_little_disk_is_told_before_it_is_needed_c04(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usual(path)._replace(free=100 << 10))
    assert doctor(*flags)[0] == 0
    flags += ["--epochs", "20", "--checkpoint_every", "2", "--model.width", "16"]  # 50 steps, 25 checkpoints
    code, found = doctor(*flags, "--keep_checkpoints", "9")
    assert code == 2
    assert "10 checkpoints of" in found["disk space"][1]
    assert "free another " in found["disk space"][1]
    assert "lower keep_checkpoints from 9" in found["disk space"][1]
    found = doctor(*flags, "--keep_every", "5")[1]
    assert "8 checkpoints of" in found["disk space"][1], "2 and one more, and 5, at steps 10 to 50, that stay for ever"
    found = doctor(*flags, "--keep_every", "1")[1]
    assert "25 checkpoints of" in found["disk space"][1], "all that there are"


def test_a_warm_up_of_most_of_the_run_is_told(doctor: Doctor, flags: list[str]) -> None:
    code, found = doctor(*flags, "--optim.warmup_epochs", "1.5")
    assert code == 0
    assert "the warm-up takes 75% of the run: lower optim.warmup_epochs to 0.1" in found["schedule"][1]
    assert "warm-up takes" not in doctor(*flags, "--optim.warmup_epochs", "0.4")[1]["schedule"][1]


@pytest.mark.parametrize(
    ("more", "has_average", "optimizer"),
    [([], False, "adamw"), (["--ema_decay", "0.9"], True, "adamw"), (["--optim.name", "muon"], False, "muon")],
)
def test_the_size_of_a_checkpoint_is_known_before_there_is_one_c04(
    flags: list[str], tmp_path: Path, more: list[str], has_average: bool, optimizer: str
) -> None:
    pretrain.main([*flags, *more])
    model = PretrainExamination(flags, lambda text: None).model
    parameters = len(list(model.parameters()))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        told = checkpoint_bytes(model, has_average, optimizer)
        # What is left are names in headers and the optimiser's step counts.
        assert told < on_disk < told + 500 * parameters
        assert (folder / "manifest.json").stat().st_size < 5000


def test_a_folder_in_use_is_refused_c13(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mae.training.run_folder.folder import RunFolder; "
        f"folder = RunFolder(Path({str(tmp_path / 'run')!r})); folder.lock(); print('locked', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        ended, found = doctor(*flags)
        assert ended == 2
        assert f"is in use by process {other.pid} on " in found["run folder"][1]
        other.communicate()
    assert doctor(*flags)[0] == 0


def test_a_damaged_newest_checkpoint_is_told_c06(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    pretrain.main(flags)
    (tmp_path / "run" / "checkpoints" / "step-000000005" / "model.safetensors").write_bytes(b"")
    code, found = doctor(*flags)
    assert code == 0
    assert found["run folder"][0] == "warning"
    assert "resumes from step-000000004, 4 of 5" in found["run folder"][1]
    assert "checkpoint step-000000005 is not used" in found["run folder"][1]
    code, found = doctor(*TINY, *TINY_DECODER, *flags[-4:-2], "--run_dir", tmp_path / "new", "--resume",
                         tmp_path / "run" / "checkpoints" / "step-000000005")  # fmt: skip
    assert code == 2
    assert found["run folder"][0] == "problem"


def test_an_export_that_is_not_possible_is_a_problem(doctor: Doctor, flags: list[str]) -> None:
    code, found = doctor(*flags, "--export.targets", "timm", "onx")
    assert code == 2
    assert found["exports"][0] == "problem"
    assert "export.targets is onx; allowed: timm, " in found["exports"][1]
