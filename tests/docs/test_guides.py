"""The code of guides runs as it is written, on few images and in few epochs."""

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mae
from docs.pages import ROOT, blocks, command_of, inline, lines
from mae import cli
from mae.data.packing import digits

pytestmark = pytest.mark.slow
ALL_DIGITS = digits.digit_splits()["train"]


def follow(guide: str) -> None:
    """Run the commands and the Python code of a guide in the working directory, in order."""
    for block in blocks(ROOT / "docs" / "guides" / guide):
        if block.language == "python":
            exec(compile(block.text, guide, "exec"), {"__name__": "__main__"})
        elif block.language == "sh":
            for words in lines(block):
                if (command := command_of(words)) is not None:
                    (run if words[0] == "mae" else launch)(shortened(command))
                elif words[0] == "python":
                    start(words[1:])


def run(words: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
        raise SystemExit(0)
    assert end.value.code in (0, None), f"mae {' '.join(words)}"


def launch(words: Sequence[str]) -> None:
    """Run a command in two processes on the CPU, in place of the GPUs of a guide, as a run of its own."""
    words = [word.replace("runs/", "launched/") for word in words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launcher, str(ROOT / "pipelines" / f"{words[0]}.py"), *words[1:]], env=environment, check=True)


def start(words: list[str]) -> None:
    """Run a script of the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def shortened(words: list[str]) -> list[str]:
    """A command with few epochs, a small model and one seed; a run that goes on from another gets one epoch more."""
    words = [word.replace("LAST", newest(word)).replace("vit_base", "digits") for word in words]
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1"
    if words[0] not in ("doctor", "pretrain", "finetune"):
        return words
    epochs = "1"
    if "--epochs" in words:
        at = words.index("--epochs")
        words, epochs = words[:at] + words[at + 2 :], "2"
    return [*words, "--epochs", epochs, "--batch_size", "48", "--optim.warmup_epochs", "0.5", "--data.workers", "0"]


def newest(path: str) -> str:
    return max((entry.name for entry in Path(path).parent.glob("step-*")), default="") if "LAST" in path else ""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder to work in, with what a guide takes from the project."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "SPLITS", {"train": 144, "val": 48, "test": 48})
    return tmp_path


def photos(folder: Path, per_class: int, first: int = 0) -> None:
    """Digits of 32 pixels in five folders by class."""
    counts = dict.fromkeys(range(5), 0)
    for item in ALL_DIGITS[first:]:
        if (number := counts.get(item.label, per_class)) < per_class:
            counts[item.label] += 1
            target = folder / ["zero", "one", "two", "three", "four"][item.label] / f"{first}-{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            assert isinstance(item.image, bytes)
            target.write_bytes(item.image)
            Image.open(target).resize((32, 32)).convert("RGB").save(target)


def test_quickstart_journey_export_and_resume(workplace: Path) -> None:
    follow("quickstart.md")
    assert (workplace / "comparison.html").exists()
    (workplace / "docs" / "guides").mkdir(parents=True)
    follow("journey.md")
    assert len(list((workplace / "docs" / "guides").glob("journey-*.png"))) == 2
    follow("export.md")
    assert (workplace / "encoder" / "verification.json").exists()
    follow("resume.md")
    assert (workplace / "runs" / "longer" / "model.safetensors").exists()


def test_many_gpus_settings_curves_and_questions(workplace: Path) -> None:
    run(["pack", "digits", "--out", "shards"])
    follow("many-gpus.md")
    assert "device: 2 processes" in (workplace / "launched" / "pre" / "history.jsonl").read_text()
    follow("settings.md")
    assert (workplace / "rates.html").exists()
    follow("curves.md")
    assert '"knn"' in (workplace / "runs" / "measured" / "metrics.jsonl").read_text()
    answers = inline(ROOT / "docs" / "guides" / "faq.md")
    photos(workplace / "folder", 1)
    files = sorted((workplace / "folder").rglob("*.png"))
    for file in files:
        file.rename(workplace / "folder" / file.parent.with_suffix(".png").name)
    labelled = ["--data.shards", "shards/train-*.tar", "--eval_shards", "shards/val-*.tar", "--run_dir", "runs/larger"]
    small = {"FOLDER": "folder", "shards": "flat", "RUN": "runs/pre", "384": "12"}
    for code in answers:
        name, *words = code.split()
        if name == "mae" and len(words) > 1:
            words = [small.get(word, word) for word in words]
            run(shortened([*words, *(labelled if words[0] == "finetune" else [])]))
    assert (workplace / "runs" / "larger" / "best.safetensors").exists()
    known = {
        "model": mae.load("runs/pre", "cpu"),
        "images": [np.zeros((8, 8), np.uint8)],
        "MASK": np.eye(4, dtype=bool)[np.newaxis],
    }
    calls = [code for code in answers if code.startswith("model.") and "(" in code]
    assert len(calls) == 3
    for code in calls:
        assert eval(code, known) is not None


def test_photos(workplace: Path) -> None:
    photos(workplace / "all", 20)
    photos(workplace / "unsorted", 20)
    follow("photos.md")
    assert pq.read_metadata(workplace / "features.parquet").num_rows == 100
    assert len(list((workplace / "photos" / "val").rglob("*.png"))) == 10
    assert len((workplace / "predictions.csv").read_text().splitlines()) == 11


def test_few_labels(workplace: Path) -> None:
    photos(workplace / "unlabelled", 10)
    photos(workplace / "labelled" / "train", 12, 300)
    photos(workplace / "labelled" / "val", 2, 700)
    follow("few-labels.md")
    assert (workplace / "runs" / "few-tuned" / "best.safetensors").exists()
