"""`mae doctor`: a healthy run is started, every fault is named with its remedy, nothing is left behind."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import png, write_shards
from webdataset import TarWriter

from doctor.conftest import TINY, Doctor
from mae.data.index import ShardIndex
from mae.doctor.command import CHECKS, main
from mae.pipelines import pretrain

ALL = [check.__name__.replace("_", " ") for check in CHECKS["pretrain"]]


def tree(folder: Path) -> dict[str, int]:
    """Everything in a folder, with its time."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_a_healthy_run_is_to_be_started(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    before = tree(tmp_path)
    code, found = doctor(*flags)
    assert code == 0
    assert list(found) == ALL
    # So small a model may well wait for its data, and other tests may keep the cores busy.
    assert {name for name, (verdict, _) in found.items() if verdict != "ok"} <= {"data speed", "processors"}
    assert "2 local shards" in found["shards"][1]
    assert "40 samples" in found["shards"][1]
    assert "40 of 40 decoded, 40 with 1 channel, short sides 8 to 8" in found["images"][1]
    assert found["batches"][1] == "16 = 1 process x 16; 2 x 8, 4 x 4, 8 x 2"
    assert "2.5 steps an epoch, 5 in all" in found["schedule"][1]
    assert found["run folder"][1] == "a new run"
    assert "5 steps of" in found["whole run"][1]
    assert tree(tmp_path) == before, "nothing is written into the run folder or beside the shards"


def test_help_comes_without_checks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: mae doctor finetune ")
    assert "--processes" in shown


def test_plain_lines_without_a_terminal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(flags)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.splitlines()[-1].startswith("start: no problem, ")
    assert len(shown.splitlines()) == len(ALL) + 1


def test_warnings_alone_do_not_keep_a_run_from_starting(doctor: Doctor, flags: list[str]) -> None:
    code, found = doctor(*flags, "--data.image_size", "16", "--data.mean", "0.1", "--data.std", "0.1")
    assert code == 0
    assert found["images"][0] == found["pixels"][0] == "warning"
    assert "40 are smaller than data.image_size 16x16, down to 8x8" in found["images"][1]
    assert "leave data.mean and data.std out" in found["pixels"][1]


@pytest.mark.parametrize(
    ("words", "check", "told"),
    [
        pytest.param(["--modle.size", "tiny"], "settings", ["--modle.size", "--model.size"], id="k01"),
        pytest.param(["--epochs", "nan"], "settings", ["epochs is nan", "above 0"], id="k02"),
        pytest.param(["--data.image_size", "9"], "settings", ["model.patch_size", "9x9"], id="k03-patch"),
        pytest.param(
            ["--model.heads", "3"], "settings", ["model.heads is 3", "divisor of the width 8"], id="k03-heads"
        ),
        pytest.param(["--processes", "3"], "batches", ["3 processes", "15 or 18"], id="k04-processes"),
        pytest.param(["--micro_batch_size", "5"], "batches", ["micro-batches of 5", "15 or 20"], id="k04-micro"),
        pytest.param(["--processes", "0"], "batches", ["processes is 0", "1 or more"], id="k04-none"),
        pytest.param(["--batch_size", "64"], "batches", ["batch_size is 64", "40 samples"], id="batch-above-data"),
        pytest.param(["--optim.warmup_epochs", "3"], "schedule", ["warmup_epochs is 3", "less than epochs"], id="k07"),
        pytest.param(["--optim.min_lr", "1"], "schedule", ["min_lr is 1", "at most the peak"], id="k07-min-lr"),
        pytest.param(["--precision", "bf16"], "precision", ["no GPU with bf16", "allowed here: auto, fp32"], id="k09"),
        pytest.param(["--data.shards", "no-*.tar"], "shards", ["no-*.tar", "matches no file"], id="no-shards"),
        pytest.param(["--data.channels", "5"], "shards", ["cannot have 5 channels", "set it to 1"], id="channels"),
        pytest.param(["--run_dir", "/proc/run"], "run dir", ["/proc/run cannot be written"], id="k08-not-writable"),
    ],
)
def test_a_fault_is_named_with_its_remedy(
    doctor: Doctor, flags: list[str], words: list[str], check: str, told: list[str]
) -> None:
    code, found = doctor(*flags, *words)
    assert code == 2
    assert list(found) == ALL, "no check keeps the others from being made"
    verdict, text = found[check]
    assert verdict == "problem"
    for word in told:
        assert word in text
    later = ALL[ALL.index(check) + 1 :]
    assert [name for name in later if found[name][0] == "problem" and found[name][1] == text] == []


def test_a_run_folder_inside_the_data_is_refused_k08(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    code, found = doctor(*flags, "--run_dir", tmp_path / "shards" / "run")
    assert code == 2
    assert found["run folder"][0] == "problem"
    assert "is in the folder of the shards" in found["run folder"][1]
    assert not (tmp_path / "shards" / "run").exists()


def test_a_link_to_a_vanished_disk_is_refused_c14(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "disk").symlink_to(tmp_path / "gone")
    code, found = doctor(*flags, "--run_dir", tmp_path / "disk" / "run")
    assert code == 2
    assert f"uses the link {tmp_path / 'disk'} to" in found["run dir"][1]
    assert str(tmp_path / "gone") in found["run dir"][1]


def test_a_foreign_folder_is_refused(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    code, found = doctor(*flags)
    assert code == 2
    assert "is not empty and holds no run" in found["run folder"][1]


def test_a_damaged_shard_is_named_d01(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    code, found = doctor(*flags)
    assert code == 2
    assert found["shards"][0] == "problem"
    assert f"{shard} is not a valid tar file" in found["shards"][1]
    assert found["images"] == ("unknown", "not examined, see shards")
    assert found["run dir"][0] == "ok"


def test_what_the_shards_hold_but_the_run_does_not_use_is_told(
    doctor: Doctor, flags: list[str], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "shards" / "train-000001.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(info)
    _, found = doctor(*flags)
    verdict, text = found["shards"]
    assert verdict == "warning"
    assert f"left out of the shards: symbolic links: 1 (the first: {tmp_path}/shards/train-000001.tar: a.png)" in text
    assert "1 of 2 shards have no images" in text


def test_a_shard_under_two_names_is_told(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    code, found = doctor(*flags, "--data.shards", shards / "train-000000.tar", shards / "train-000000.tar")
    assert code == 2
    assert "is listed twice" in found["shards"][1]
    (shards / "again.tar").write_bytes((shards / "train-000001.tar").read_bytes())
    code, found = doctor(*flags)
    assert code == 0
    assert found["shards"][0] == "warning"
    assert "2 shards hold the same samples" in found["shards"][1]


@pytest.mark.parametrize(("allowed", "code"), [(0, 2), (1, 0)])
def test_a_bad_image_is_named_s01(doctor: Doctor, flags: list[str], tmp_path: Path, allowed: int, code: int) -> None:
    path = tmp_path / "bad" / "train.tar"
    path.parent.mkdir()
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in range(20):
            tar.write({"__key__": f"{number:02}", "png": png(number)[: 60 if number == 7 else None]})
    ended, found = doctor(*flags, "--data.shards", path, "--data.max_bad_samples", str(allowed))
    assert ended == code
    assert found["images"][0] == ("problem" if code else "ok")
    assert "19 of 20 decoded" in found["images"][1]
    if code:
        assert f"{path}: 07.png" in found["images"][1]
        assert "--skip_bad" in found["images"][1]


def test_colour_that_is_thrown_away_is_told(doctor: Doctor, flags: list[str], make_shards: Callable[..., Path]) -> None:
    colour = make_shards([20], name="colour", mode="RGB")
    code, found = doctor(*flags, "--data.shards", colour)
    assert code == 0
    assert "data.channels is 1, so the colour of some images is lost; --data.channels 3 keeps it" in found["images"][1]
    code, found = doctor(*flags, "--data.channels", "3")
    assert "all files are gray: --data.channels 1" in found["images"][1]


def test_a_run_that_goes_on_is_recognised_and_left_alone_c09_c07(
    doctor: Doctor, flags: list[str], tmp_path: Path
) -> None:
    pretrain.main(flags)
    before = tree(tmp_path)
    code, found = doctor(*flags)
    assert code == 0
    assert found["run folder"] == ("ok", "resumes from step-000000005, 5 of 5 steps are done")
    assert "2 of them already written" in found["disk space"][1]
    code, found = doctor(*flags, "--model.mask_ratio", "0.5")
    assert code == 2
    assert "model.mask_ratio was 0.75, is 0.5" in found["run folder"][1]
    assert tree(tmp_path) == before
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    code, found = doctor(*flags)
    assert code == 2
    assert "no checkpoint in" in found["run folder"][1]


def test_fine_tuning_labels_and_weights(doctor: Doctor, make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards = make_shards([20, 20])
    flags = [*TINY, "--data.shards", str(shards / "train-000000.tar"), "--run_dir", str(tmp_path / "run")]
    flags += ["--augment.rand_augment", "0", "--batch_size", "8"]
    before = tree(tmp_path)
    code, found = doctor("finetune", *flags, "--eval_shards", shards / "train-000001.tar", "--labels_per_class", "2")
    assert code == 0
    assert list(found) == [check.__name__.replace("_", " ") for check in CHECKS["finetune"]]
    assert found["labels"][0] == "ok"
    assert "4 classes with 5 to 5 samples each, of which training uses 2 each; 20 samples to eval" in found["labels"][1]
    assert found["starting weights"][0] == "warning"
    assert found["batches"][1].endswith("2 x 4, 4 x 2, 8 x 1 is not a multiple of 2"), "mixup pairs images"
    assert "1.0 steps an epoch" in found["schedule"][1]
    code, found = doctor("finetune", *flags, "--eval_shards", shards, "--batch_size", "7", "--labels_per_class", "9")
    assert code == 2
    assert "class 0 has 5 samples, but labels_per_class is 9" in found["labels"][1]
    code, found = doctor("finetune", *flags, "--eval_shards", shards, "--batch_size", "7", "--init", "nowhere")
    assert "1 or more of 40 evaluation samples are also training samples" in found["labels"][1]
    assert "nowhere does not exist" in found["pixels"][1]
    assert found["step"][0] == "unknown"
    code, found = doctor("finetune", *flags, "--batch_size", "7")
    assert "mixup and cutmix pair" in found["batches"][1]
    assert tree(tmp_path) == before


def test_unlabelled_shards_cannot_be_fine_tuned_on(doctor: Doctor, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in range(20):
            tar.write({"__key__": f"{number:02}", "png": png(number)})
    code, found = doctor("finetune", *TINY, "--data.shards", path, "--run_dir", tmp_path / "run")
    assert code == 2
    assert "20 of 20 samples have no valid .cls label" in found["labels"][1]


def test_a_stream_is_examined_without_an_index(doctor: Doctor, flags: list[str]) -> None:
    stream = ["--data.reader", "stream", "--data.stream_samples", "40"]
    code, found = doctor(*flags, *stream, "--data.mean", "0.5", "--data.std", "0.29")
    assert code == 0
    assert "read as a stream" in found["shards"][1]
    assert "25 of 25 decoded" in found["images"][1]
    assert found["step"][0] == "ok"
    code, found = doctor(*flags, *stream)
    assert code == 2
    assert "a stream cannot measure them" in found["pixels"][1]


def test_images_to_measure_on_while_training_are_opened(doctor: Doctor, flags: list[str], tmp_path: Path) -> None:
    code, found = doctor(*flags)
    assert found["held out"] == ("ok", "without evaluation.eval_shards, nothing is measured while training")
    write_shards(tmp_path / "more", [40, 9])  # the last nine are other images than the run's
    others = ["--evaluation.eval_shards", tmp_path / "more" / "train-000001.tar"]
    code, found = doctor(*flags, *others)
    assert (code, found["held out"][0]) == (0, "ok")
    assert found["held out"][1] == "9 of 9 samples of evaluation.eval_shards; no labels: held-out loss and rank only"
    code, found = doctor(*flags, "--evaluation.eval_shards", tmp_path / "none.tar")
    assert (code, found["held out"][0]) == (2, "problem")
    assert "none.tar" in found["held out"][1]


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["--run_dir", "x"])
    assert end.value.code == 2
    assert "give --processes N" in capsys.readouterr().err


def test_an_unforeseen_failure_is_listed_as_a_problem(
    doctor: Doctor, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardIndex, "bad", lambda index: 1 / 0)
    code, found = doctor(*flags)
    assert code == 2
    assert found["shards"] == ("problem", "the check failed: ZeroDivisionError: division by zero")
    assert found["images"] == ("unknown", "not examined, see shards")


def can_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="only root may mount small disks")
def test_small_disks_and_limits_for_real_c04_p11(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    script = (
        'mount -t tmpfs -o size=16k none "$1" && mount -t tmpfs -o size=128k none /dev/shm && ulimit -n 64 && '
        'shift && exec "$@"'
    )
    command = [sys.executable, "-m", "mae", "doctor", *flags, "--data.workers", "6", "--data.image_size", "32"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", tmp_path / "run", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2
    found = {line[9:26].strip(): line for line in done.stdout.splitlines()}
    assert found["disk space"].startswith("problem")
    assert "free another " in found["disk space"]
    assert found["shared memory"].startswith("problem")
    assert "--shm-size" in found["shared memory"]
    assert found["open files"].startswith("problem")
    assert "ulimit -n " in found["open files"]
    assert found["step"] == f"{'unknown':<8} {'step':<{len('starting weights')}}  not examined, see shared memory"
    assert len(done.stdout.splitlines()) == len(ALL) + 1
    assert list((tmp_path / "run").iterdir()) == []
