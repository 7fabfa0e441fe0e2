"""The code of guides runs as it is written, on few images and in few epochs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from docs.pages import ROOT, blocks, command_of, lines
from mae import cli
from mae.data.packing.digits import digit_splits

pytestmark = pytest.mark.slow


def follow(guide: str) -> None:
    """Run the commands and the Python code of a guide in the working directory, in order."""
    for block in blocks(ROOT / "docs" / "guides" / guide):
        if block.language == "python":
            exec(compile(block.text, guide, "exec"), {"__name__": "__main__"})
        elif block.language == "sh":
            for words in lines(block):
                if words[0] == "mae" and (command := command_of(words)) is not None:
                    run(shortened(command))


def run(words: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
        raise SystemExit(0)
    assert end.value.code in (0, None), f"mae {' '.join(words)}"


def shortened(words: list[str]) -> list[str]:
    """A command with few epochs and one seed; a run that goes on from another gets one more than that."""
    words = [word.replace("LAST", newest(word)) for word in words]
    if "--seeds" in words:
        words[words.index("--seeds") + 1] = "1"
    if words[0] not in ("pretrain", "finetune"):
        return words
    epochs = "1"
    if "--epochs" in words:
        at = words.index("--epochs")
        words, epochs = words[:at] + words[at + 2 :], "2"
    return [*words, "--epochs", epochs, "--optim.warmup_epochs", "0.5", "--data.workers", "0"]


def newest(path: str) -> str:
    return max((entry.name for entry in Path(path).parent.glob("step-*")), default="") if "LAST" in path else ""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folder to work in, with what a guide takes from the project."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def photos(folder: Path, per_class: int, first: int = 0) -> None:
    """Digits of 32 pixels in five folders by class."""
    counts = dict.fromkeys(range(5), 0)
    for item in digit_splits()["train"][first:]:
        if (number := counts.get(item.label, per_class)) < per_class:
            counts[item.label] += 1
            target = folder / ["zero", "one", "two", "three", "four"][item.label] / f"{first}-{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            assert isinstance(item.image, bytes)
            target.write_bytes(item.image)
            Image.open(target).resize((32, 32)).convert("RGB").save(target)


def test_quickstart_export_and_resume(workplace: Path) -> None:
    follow("quickstart.md")
    assert (workplace / "comparison.html").exists()
    follow("export.md")
    assert (workplace / "encoder" / "verification.json").exists()
    follow("resume.md")
    assert (workplace / "runs" / "longer" / "model.safetensors").exists()


def test_photos(workplace: Path) -> None:
    photos(workplace / "all", 20)
    follow("photos.md")
    assert len(list((workplace / "photos" / "val").rglob("*.png"))) == 10
    assert len((workplace / "predictions.csv").read_text().splitlines()) == 11


def test_few_labels(workplace: Path) -> None:
    photos(workplace / "unlabelled", 10)
    photos(workplace / "labelled" / "train", 12, 300)
    photos(workplace / "labelled" / "val", 2, 700)
    follow("few-labels.md")
    assert (workplace / "runs" / "few-tuned" / "best.safetensors").exists()
