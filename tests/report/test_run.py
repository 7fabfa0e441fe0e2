import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mae import cli
from mae.report import refreshing
from mae.report import run as run_report
from mae.report.reading import read_run
from mae.report.run import write_run_report
from mae.report.timeline import timeline
from mae.tasks.pretraining import PretrainSettings
from mae.training.run_folder.folder import RunFolder
from mae.training.run_folder.history import record_start
from tests.report.runs import make_finetuning, make_run
from tests.training.jobs import job_of

RECORD = {
    "kind": "train",
    "loss": 0.5,
    "lr": 0.1,
    "images_per_second": 1234.0,
    "step_seconds": 0.25,
    "data_wait": 0.125,
    "tflops": 99.5,
    "mfu": 0.4321,
    "peak_memory": 3 * 2**30,
    "seconds": 75.0,
}


def report(folder: Path, **replaced: Any) -> str:
    run = RunFolder(folder)
    settings = PretrainSettings(run_dir=folder)
    run.create(settings)
    run.log({"kind": "baselines", "step": 0, "patch_mean": 0.73, "place_mean": 0.688, "images": 256})
    for step in range(1, 4):
        record = {**RECORD, "step": step, "epoch": float(step), **replaced}
        run.log({name: value for name, value in record.items() if value is not None})
    write_run_report(run, torch.device("cpu"), "3 steps")
    return re.sub(r"src=\"[^\"]+\"", "", run.report.read_text())


def test_the_report_tells_speed_memory_and_what_a_trivial_model_would_reach(tmp_path: Path) -> None:
    text = report(tmp_path / "known")
    for shown in (
        "1,234",
        "0.25",
        "12.5 %",
        "99.5",
        "43.2 %",
        "3.00",
        "1:15",
        "predicting each patch&#x27;s mean gives 0.730",
        "each place 0.688",
    ):
        assert shown in text
    assert "43.2 %" not in report(tmp_path / "unknown", mfu=None)


def test_the_report_of_a_run_at_its_end_and_of_one_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5], "")
    record_start(folder.path, 0, "device: CPU", PretrainSettings(folder.path))
    write_run_report(folder, torch.device("cpu"), None)
    text = folder.report.read_text()
    assert "The run is going on after step 20 of 500" in text
    assert "What the model sees" not in text
    write_run_report(folder, torch.device("cpu"), "20 steps")
    text = folder.report.read_text()
    assert "finished: 20 steps" in text
    assert "killed" not in text
    assert "What the model sees" in text


def test_the_timeline_tells_every_start_and_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [0.6, 0.5], "")
    record_start(folder.path, 0, "device: CPU", PretrainSettings(folder.path))
    folder.record_exit("preempted", "SIGTERM: saved at step 10 of 500")
    record_start(folder.path, 10, "device: CPU", PretrainSettings(folder.path))
    record_start(folder.path, 20, "device: CPU", PretrainSettings(folder.path))
    folder.record_exit("error", "not exported")
    folder.record_exit("error", "the disk <b>is full")
    folder.record_skipped({3: [1], 4: [2]})
    text = timeline(read_run(folder.path))
    told = re.sub(r"<time>[^<]*</time>|<[^>]+>", "\n", text)
    host = socket.gethostname()
    assert [line.strip() for line in told.splitlines() if line.strip()] == [
        f"started on {host}, device: CPU",
        "interrupted: SIGTERM: saved at step 10 of 500",
        f"resumed at step 10 on {host}, device: CPU",
        "no end is recorded: it was killed",
        f"resumed at step 20 on {host}, device: CPU",
        "ended with an error: the disk &lt;b&gt;is full",
        "skipped, because loss or gradient was not finite: steps 3, 4",
        "no checkpoint is kept: this run cannot be resumed",
    ]


def test_settings_are_marked_by_what_the_run_recorded(tmp_path: Path) -> None:
    """The defaults of the version that made the run count, not those of the version that makes the page."""
    folder = make_run(tmp_path / "run", [0.6, 0.5])
    said = "Settings that are not the defaults of mae"

    def marked() -> tuple[str, list[str]]:
        section = text_of(folder).partition(said)[2].partition("<details>")[0]
        return section.partition("</p>")[0], re.findall(r"<tr><td>([^<]+)</td>", section)

    text, names = marked()
    assert "which made this page. The run has not recorded which of them were given" in text
    assert names == ["run_dir", "epochs", "data.shards"]
    record_start(folder.path, 0, "device: CPU", PretrainSettings(folder.path, epochs=50.0))
    history = folder.path / "history.jsonl"
    history.write_text(history.read_text().replace('"run_dir", "epochs"', '"epochs", "batch_size"'))
    text, names = marked()
    assert text.endswith(", with which the run was started:")
    assert names == ["epochs", "batch_size"]
    assert "<td>device</td><td>CPU</td>" in text_of(folder)
    history.write_text(history.read_text().replace('["epochs", "batch_size"]', "3").replace('"libraries": {', '"x": {'))
    assert "has not recorded" in marked()[0]


def text_of(folder: RunFolder) -> str:
    return run_report.report([read_run(folder.path)], torch.device("cpu"), 0)


def test_pretraining_and_fine_tuning_side_by_side_share_no_chart_of_losses(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "pre", [0.6, 0.5]), make_finetuning(tmp_path / "tuned", [0.3, 0.5])]
    plain = make_run(tmp_path / "plain", [0.06, 0.05])
    settings = plain.path / "settings.yaml"
    settings.write_text(settings.read_text().replace("norm_pix_loss: true", "norm_pix_loss: false"))
    text = run_report.report([read_run(run.path) for run in (*runs, plain)], torch.device("cpu"), 0)
    charts = re.findall(r'<figure class="chart"><figcaption>([^<]+)<small>.*?aria-label="([^"]*)"', text)
    losses = {title: re.findall(r"(?:^|; |: )(pre|tuned|plain) ", label) for title, label in charts if "loss" in title}
    assert losses == {
        "Training loss (normalised pixels)": ["pre"],
        "Training loss (plain pixels)": ["plain"],
        "Training loss": ["tuned"],
        "Validation loss": ["tuned"],
    }
    assert "<td>pre</td><td>pretraining</td>" in text
    assert "Losses of pretraining and of fine-tuning are different quantities" in text
    difference = text.partition("<h2>Settings that differ")[2].partition("</section>")[0]
    assert "<td>model.norm_pix_loss</td><td>True</td><td>(not set)</td><td>False</td>" in difference
    assert "<td>model.mask_ratio</td>" not in difference
    assert "exist only in pretraining or only in fine-tuning" in difference


def test_runs_side_by_side(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "one" / "run", [0.6, 0.5]), make_run(tmp_path / "two" / "run", [0.7, 0.6], data_wait=0.4)
    settings = (b.path / "settings.yaml").read_text()
    (b.path / "settings.yaml").write_text(settings.replace("base_lr: 0.00015", "base_lr: 0.001"))
    out = tmp_path / "out" / "page.html"
    cli.main(["report", str(a.path), str(b.path), "--out", str(out)])
    text = out.read_text()
    assert "2 runs side by side" in text
    assert re.search(r"<td>optim.base_lr</td><td[^>]*>0.00015</td><td[^>]*>0.001</td>", text)
    assert "<td>optim.weight_decay</td>" not in text.partition("Settings that differ")[2].partition("Timelines")[0]
    assert text.count("The device waited for data 40 % of the time") == 1
    for name in ("one/run", "two/run"):
        assert f'aria-pressed="true" data-line="{int(name == "two/run")}"><i class="swatch' in text
        assert f"<h3>{name}</h3>" in text
    assert read_run(a.path).path.name == "run"


def test_reports_are_refreshed_now_and_then_and_end_no_run(
    make_shards: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = job_of(make_shards([24]) / "train-000000.tar", tmp_path / "run", 0)
    job.folder.path.mkdir()
    now, written = 0.0, list[float]()

    def slow(*_: object) -> None:
        nonlocal now
        written.append(now)
        now += 3
        raise ValueError("no room")

    monkeypatch.setattr(refreshing, "write_run_report", slow)
    refresh = refreshing.report_refresher(job, lambda: now)
    while now < 1000:
        refresh()
        now += 1
    assert written == [120, 423, 726]
    assert "report.html is not written: ValueError: no room; `mae report` tries again" in capsys.readouterr().err
