"""`benchmarks/gpu.py`: its arithmetic, its state after a cut, its time; and a rehearsal of all stages on the CPU."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_stages import learn, markdown, place, runs
from benchmarks.gpu_stages.arithmetic import cores_needed, mfu
from benchmarks.gpu_stages.commands import run_python, run_until
from benchmarks.gpu_stages.measurement import Measurement, run_stage
from benchmarks.gpu_stages.place import Place, deadline_after
from benchmarks.gpu_stages.results import FailedError, Figures, Record, Results, SkippedError, UnfinishedError
from benchmarks.gpu_stages.worker import Worker
from mae.models import flops
from mae.models.settings import MaskedAutoencoderSettings

ROOT = Path(__file__).parent.parent
H100 = "NVIDIA H100 80GB HBM3"


def place_of(folder: Path, seconds: float = 60.0) -> Place:
    return Place(folder, None, True, time.monotonic() + seconds)


def test_mfu_is_useful_work_as_a_share_of_the_peak() -> None:
    large = MaskedAutoencoderSettings(size="large", decoder_width=512, decoder_depth=8, decoder_heads=16)
    per_image = flops.autoencoder_flops(large, (224, 224), 3).training
    assert mfu(3620, per_image, flops._PEAK_FLOPS[H100]) == pytest.approx(0.45, abs=0.005)
    assert mfu(100.0, 2e12, 400e12) == 0.5
    assert mfu(100.0, 2e12, None) is None
    assert cores_needed(1000.1, 500.0) == 3


def test_the_peaks_are_of_whole_boards_only() -> None:
    assert {flops._PEAK_FLOPS[name] for name in (H100, "NVIDIA H200", "NVIDIA GH200 480GB")} == {989.4e12}
    assert "NVIDIA H100 80GB HBM3 MIG 1g.10gb" not in flops._PEAK_FLOPS


def raising(error: BaseException) -> Any:
    def run() -> Figures:
        raise error

    return run


def test_whatever_becomes_of_a_measurement_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    ways = {
        "good": dict,
        "bad": raising(FailedError("it ended with 1", "line 1\n\nline 2")),
        "broken": raising(KeyError("loss")),
        "impossible": raising(SkippedError("no shards")),
        "long": raising(UnfinishedError("the next call goes on", {"epoch": 3})),
    }
    found = Results(tmp_path / "results.json")
    run_stage("smoke", [Measurement(*way) for way in ways.items()], place_of(tmp_path), found, "a GPU")
    read = Results(tmp_path / "results.json")
    assert [record.status for record in read] == ["ok", "failed", "failed", "skipped", "unfinished"]
    assert [record.traceback for record in read][:2] == ["", "line 1\nline 2"]
    assert "KeyError: 'loss'" in [record.traceback for record in read][2]
    assert read.figures("smoke", "long") == {"epoch": 3}
    assert [name for name in ways if not read.is_done("smoke", name)] == ["long"]
    read.forget_failures()
    assert [name for name in ways if not read.is_done("smoke", name)] == ["bad", "broken", "impossible", "long"]
    page = (tmp_path / "results.md").read_text()
    assert "| bad | failed | 0 |  | it ended with 1 |" in page
    assert "KeyError: 'loss'" in page


def test_a_cut_while_the_results_are_written_keeps_the_last_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Results(tmp_path / "results.json")
    found.add(Record("step", "first", "ok", 1.0))

    def cut(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", cut)
        found.add(Record("step", "second", "ok", 1.0))
    assert [record.name for record in Results(found.path)] == ["first"]
    found.write()
    assert [record.name for record in Results(found.path)] == ["first", "second"]


def test_what_is_done_is_not_done_again_and_what_does_not_fit_is_left(tmp_path: Path) -> None:
    calls = list[str]()

    def count() -> Figures:
        calls.append("called")
        return {"images_per_second": 2.5}

    few = Place(tmp_path, None, False, time.monotonic() + 30)
    for _ in range(2):
        found = Results(tmp_path / "results.json")
        run_stage("step", [Measurement("short", count, 5.0), Measurement("long", count, 40.0)], few, found, "a GPU")
    assert calls == ["called"]
    assert not found.is_done("step", "long")


def test_a_call_ends_before_its_minutes_are_over() -> None:
    left = {minutes: deadline_after(minutes) - time.monotonic() for minutes in (1.0, 9.0, 60.0)}
    assert left == {
        1.0: pytest.approx(52, abs=0.5),
        9.0: pytest.approx(525, abs=0.5),
        60.0: pytest.approx(3585, abs=0.5),
    }


SLEEP = ("-c", "import time; time.sleep(60)")


def test_a_command_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match=r"took longer than 0 s"):
        run_python(place_of(tmp_path), *SLEEP, limit=0.1)
    with pytest.raises(UnfinishedError, match="the time of this call was up"):
        run_python(place_of(tmp_path, 0.1), *SLEEP)
    with pytest.raises(FailedError, match=r"ended with exit code 3: it is wrong") as failure:
        run_python(place_of(tmp_path), "-c", "import sys; print('first\\nit is wrong'); sys.exit(3)")
    assert failure.value.detail == "first\nit is wrong\n"
    ended = run_until(place_of(tmp_path), SLEEP, lambda: True)
    assert ended.was_stopped
    assert ended.seconds < 30


def test_a_lost_or_stuck_worker_process_costs_one_measurement(tmp_path: Path) -> None:
    worker, images = Worker(place_of(tmp_path)), ("toy_shards.write", str(tmp_path), "set", "test", 8)
    try:
        with pytest.raises(FailedError, match="has no attribute 'absent'") as failure:
            worker.ask("toy_shards.absent")
        assert "Traceback" in failure.value.detail
        assert worker._process is None  # a fault of the device would stay with it
        with pytest.raises(FailedError, match="took longer than 0 s"):
            worker.ask(*images, limit=0.0)
        assert worker.ask(*images) == {"images": 128}
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert worker.ask(*images) == {"images": 128}
    finally:
        worker.close()


def test_wheels_are_unpacked_where_python_finds_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rare-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("rare_pure/__init__.py", "")
        wheel.writestr("rare-1.data/platlib/rare_binary/__init__.py", "")
        wheel.writestr("rare-1.data/scripts/rare", "")
    names = ("rare_pure", "rare_binary", "rare_absent")
    assert place.missing_modules(names, tmp_path / "site") == list(names)
    place.make_importable(tmp_path / "site", tmp_path)
    assert place.missing_modules(names, tmp_path / "site") == ["rare_absent"]
    assert place.missing_modules(["mae"], tmp_path / "site") == []
    assert (tmp_path / "site" / "mae" / "pipelines" / "pretrain.py").exists()
    assert not (tmp_path / "site" / "rare").exists()


@pytest.mark.parametrize("flag", ["--wheels", "--shards"])
def test_a_folder_that_is_not_there_is_told_at_the_start(flag: str, tmp_path: Path) -> None:
    words = ["benchmarks/gpu.py", "--stage", "learn", "--out", str(tmp_path), flag, str(tmp_path / "absent")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{flag} {tmp_path}/absent is no folder" in done.stderr


def test_shards_of_cifar100_are_not_taken_for_cifar10(tmp_path: Path) -> None:
    for name in ("cifar10-train-000000.tar", "cifar100-train-000000.tar", "tiny-imagenet-100-train-000000.tar"):
        (tmp_path / name).touch()
    there = Place(tmp_path / "out", tmp_path, False, 0.0)
    found = [[Path(path).name for path in images.shards(there, "train")] for images in learn.SETS]
    assert found == [["cifar10-train-000000.tar"], ["tiny-imagenet-100-train-000000.tar"]]


def test_what_failed_before_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        found = Results(tmp_path / "results.json")
        run_stage("step", [Measurement("bad", raising(FailedError("no")))], place_of(tmp_path), found, "a GPU")
    assert capsys.readouterr().out.splitlines()[1] == "step, bad: failed before; --again tries it once more"


def test_tables_say_what_plain_is_compared_with(tmp_path: Path) -> None:
    found = Results(tmp_path / "results.json")
    for name, speed in (("plain", 100.0), ("ours", 250.0)):
        found.add(Record("step", f"ViT-B/16: {name}", "ok", 1.0, figures={"images_per_second": speed, "mfu": 0.451}))
    found.add(Record("loader", "decoded on cpu, 1 workers", "ok", 1.0, figures={"images_per_second": 60.0}))
    graphs = {"images_per_second": 250.0, "graphs_dropped": 1}
    found.add(Record("step", "ViT-B/16: ours, CUDA graphs", "ok", 1.0, figures=graphs))
    page = markdown.page(found)
    assert "torch did without CUDA graphs |" in page
    assert "| ViT-B/16: ours | ok | 250 | 2.50 | 45.1% |" in page
    assert "ViT-B/16: ours, 250 images/s: 5 cores at 60 images/s each" in page


def test_tensors_are_compared_by_their_bytes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    for name, changed in (("one", {}), ("same", {}), ("other", {"b": torch.ones(4)}), ("less", {"c": torch.ones(1)})):
        save_file(weights | changed, tmp_path / name)
    assert runs.different_tensors(tmp_path / "one", tmp_path / "same") == []
    assert runs.different_tensors(tmp_path / "one", tmp_path / "other") == ["b"]
    assert runs.different_tensors(tmp_path / "one", tmp_path / "less") == ["c"]


@pytest.mark.slow
def test_a_rehearsal_of_all_stages_is_green_and_resumes(tmp_path: Path) -> None:
    words = ["--rehearse", "--stage", "all", "--minutes", "40", "--out", str(tmp_path / "out")]

    def call() -> str:
        done = subprocess.run(
            [sys.executable, "benchmarks/gpu.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = call()
    written = (tmp_path / "out" / "results.json").read_text()
    records = [Record(**record) for record in json.loads(written)["records"]]
    wrong = [record for record in records if record.status not in ("ok", "skipped")]
    assert not wrong, said + "".join(f"\n{record.name}:\n{record.traceback}" for record in wrong)
    assert {record.stage for record in records} == {"smoke", "step", "loader", "learn"}
    assert all(record.message for record in records if record.status == "skipped")
    page = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {record.name} |" in page for record in records)
    assert len(list((tmp_path / "out").glob("learn-*"))) == 6
    assert call().splitlines() == [f"results: {tmp_path / 'out' / 'results.md'}"]
    assert (tmp_path / "out" / "results.json").read_text() == written
