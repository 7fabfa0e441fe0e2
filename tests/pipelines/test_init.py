"""`mae init`: the files that it writes are used by the commands that it prints, from a folder to predictions."""

import csv
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae import cli
from mae.pipelines import init
from mae.processes import default_workers
from mae.proposal import machine
from tests.conftest import png, write_shards
from tests.proposal.test_looking import write_images


@pytest.fixture(autouse=True)
def _known_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The speed of this machine must not decide what is tested."""
    for module in (machine, init):
        monkeypatch.setattr(module, "measured_flops", lambda *_: 1e11)
    monkeypatch.chdir(tmp_path)


def start(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    cli.main(["init", *shlex.split(words)])
    said = capsys.readouterr().out
    return [line.strip() for line in said.partition("next:\n")[2].splitlines()]


def test_the_lines_of_the_readme_lead_from_photos_to_predictions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## From a folder of photos to predictions")[2].split("```")[1]
    first, *lines = [line for line in section.splitlines() if line.startswith("mae ")]
    for place, split in enumerate(("train", "val")):
        for number, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "photos" / split / name, 20, 1000 * place + 100 * number)
    assert start(first.removeprefix("mae init "), capsys) == lines
    settings = yaml.safe_load(Path("config.yaml").read_text())
    assert settings["epochs"] == 800
    assert settings["data"]["image_size"] == [8, 12]
    shorter = ["--epochs", "2", "--optim.warmup_epochs", "0.1", "--data.workers", "0"]
    quick = {"pack": ["--workers", "0"], "pretrain": shorter, "finetune": shorter, "predict": ["--workers", "0"]}
    quick["evaluate"] = ["--data.workers", "0", "--protocols", "knn"]
    for line in lines:
        command, *words = shlex.split(line)[1:]
        cli.main([command, *words, *quick[command]])
    with Path("predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert all({row["classes_1"], row["classes_2"]} == {"cat", "dog"} for row in rows)
    for run in ("photos", "photos-finetuned"):
        log = Path("runs", run, "metrics.jsonl").read_text()
        assert "evaluation" in log if run == "photos" else '"accuracy"' in log


def test_shards_need_no_packing_and_unlabelled_ones_are_embedded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards", [20], classes=2)
    assert [line.split()[1] for line in start("shards", capsys)] == ["pretrain", "finetune", "predict"]
    write_images(tmp_path / "flat", 20)
    cli.main(["pack", "flat", "--out", "packed"])
    capsys.readouterr()
    commands = start("packed/*.tar --out other.yaml", capsys)
    assert [line.split()[1] for line in commands] == ["pretrain", "embed"]
    assert not Path("other-finetune.yaml").exists()


def test_a_table_of_labels_goes_from_proposal_to_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 20)
    names = sorted(path.name for path in (tmp_path / "photos").iterdir())
    lines = [f"{name},{'red oak' if number % 2 else 'elm'}" for number, name in enumerate(names[:18])]
    Path("my labels.csv").write_text("\n".join(["image,class", *lines]))
    pack, *others = start("photos --label_file 'my labels.csv'", capsys)
    assert pack == "mae pack photos --out shards/photos --label_file 'my labels.csv'"
    assert [line.split()[1] for line in others] == ["pretrain", "finetune", "predict"]
    cli.main([*shlex.split(pack)[1:], "--workers", "0"])
    assert "2 files are left out: 2 without a line in my labels.csv" in capsys.readouterr().out
    assert Path("shards/photos/classes.txt").read_text() == "elm\nred oak\n"
    with pytest.raises(SystemExit) as end:
        cli.main(["init", "shards/photos", "--label_file", "my labels.csv", "--out", "third.yaml"])
    assert end.value.code == 2
    assert "label_file is for folders of images" in capsys.readouterr().err


def test_existing_files_stay_unless_told_otherwise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 20)
    Path("config.yaml").write_text("mine")
    with pytest.raises(SystemExit) as end:
        cli.main(["init", "photos"])
    assert end.value.code == 2
    assert "config.yaml exists; give another --out" in capsys.readouterr().err
    assert Path("config.yaml").read_text() == "mine"
    assert start("photos --overwrite", capsys)
    assert "epochs:" in Path("config.yaml").read_text()


def test_odd_images_become_a_sentence_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_images(tmp_path / "photos" / "one class", 20)
    (tmp_path / "photos" / "one class" / "gray.png").write_bytes(png(99, (8, 8), "L"))
    (tmp_path / "photos" / "one class" / "cut.jpg").write_bytes(b"nothing")
    os.mkfifo(tmp_path / "photos" / "one class" / "pipe.png")
    commands = start("photos", capsys)
    text = " ".join(Path("config.yaml").read_text().replace("\n# ", " ").split())
    assert "All images are of one class" in text
    assert "1 of 22 sampled images cannot be read" in text
    assert "1 in 1 images, 3 in 20 images" in text
    assert commands[0] == "mae pack photos --out shards/photos --skip_bad True"
    cli.main(shlex.split(commands[0])[1:])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "contains no image"),
        ({"a.txt": b"x"}, "contains no image"),
        ({"a.png": png(0)}, "contains 1 image"),
        ({"a.png": b"x", "b.png": b"y"}, "none of 2 images in photos can be decoded"),
        ({"a.tar": b"x"}, "not a valid tar file"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(
    files: dict[str, bytes], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name, data in files.items():
        (tmp_path / "photos" / name).write_bytes(data)
    with pytest.raises(SystemExit) as end:
        cli.main(["init", "photos"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("config.yaml").exists()


def test_the_machine_is_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.undo()
    monkeypatch.setattr(machine, "_ENOUGH_SECONDS", 0.0)
    small: Any = machine._SMALL
    flops = machine.measured_flops(Accelerator(cpu=True), small, (16, 16), 1)
    assert 1e7 < flops < 1e15
    assert default_workers() >= 1
