"""The card of an export says what is true, tells nothing of the machine, and its lines of code run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from export.guide import COMMAND, GUIDE, files_in, files_in_guide
from export.models import MODELS, SQUARE, autoencoder, classifier, export, trained
from mae.export.card import card as card_text
from mae.export.facts import Facts, facts_of
from mae.export.targets import TARGETS
from mae.export.trained_model import TrainedModel, read_trained_model
from mae.files import write_atomically
from mae.models.selection import Selection
from mae.models.weights import write_weights

SLOW = ("onnx", "onnx_uint8", "torch_export")
SETTINGS = {
    "run_dir": "/home/alice/runs/secret", "init": "/home/alice/runs/first", "seed": 3, "epochs": 20.0, "batch_size": 8,
    "data": {"shards": ["/home/alice/data/train-*.tar"]}, "optim": {"base_lr": 0.001, "name": "adamw"},
    "augment": {"crop_scale": [0.6, 1.0], "rand_augment": "none"}, "freeze": "none",
}  # fmt: skip


def in_run(
    model: TrainedModel, run: Path, name: str = "model.safetensors", records: Sequence[Any] = ()
) -> TrainedModel:
    """The model as the file `name` of a run with one checkpoint, at step 40, of 5 epochs of 64 samples."""
    folder = run / "checkpoints" / "step-000000040"
    folder.mkdir(parents=True)
    position = {"samples": 320, "fingerprint": "f" * 64, "global_batch": 8, "order_version": 2}
    (folder / "manifest.json").write_text(json.dumps({"step": 40, "position": position, "notes": {}}))
    (run / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    train = [{"kind": "train", "step": step, "epoch": step * 8 / 64} for step in (20, 40, 60)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*train, *records]))
    (run / "pictures").mkdir()
    for step in (20, 40, 60):
        write_atomically(run / "pictures" / f"step-{step:09d}.png", f"picture of {step}".encode())
    (run / name).parent.mkdir(exist_ok=True)
    write_weights(run / name, model.weights, model.description.metadata())
    return read_trained_model(run / name)


def card_of(model: TrainedModel, out: Path, target: str = "timm") -> str:
    return (export(model, target, out).folder / "README.md").read_text()


def cases(target: str) -> list[TrainedModel]:
    """Models that the target holds: one of each kind, or one alone where an export takes seconds."""
    models = [classifier("linear"), autoencoder(SQUARE, (8, 8), 3)]
    held = [model for model in models if TARGETS[target].refusal(model) is None]
    return held[:1] if target in SLOW else held


@pytest.mark.parametrize("target", TARGETS)
def test_the_lines_of_a_card_run_in_its_folder(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TARGETS[target].require_packages()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files, run = files_in_guide(GUIDE.read_text())[target], set[str]()
    for model in cases(target):
        if (code := TARGETS[target].example(model, ".")) in run:
            continue
        folder = tmp_path / str(len(run))
        card = card_of(model, folder, target)
        assert all(name in files for name in files_in(folder)), f"docs/export.md lacks files: {COMMAND}"
        assert f"```python\n{code}\n```" in card
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {"images": model.images(2)}
        exec(code, names)
        assert 2 <= len(code.splitlines()) <= 8
        assert len(names) > 2
        run.add(code)
    assert run


@pytest.mark.parametrize(("settings", "image_size", "channels"), MODELS)
def test_a_card_describes_model_and_images(
    settings: Any, image_size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    model = autoencoder(settings, image_size, channels)
    card = card_of(model, tmp_path / "out")
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vision-transformer", "masked-autoencoder"],
    }
    encoder = sum(tensor.numel() for tensor in model.encoder_weights.values())
    assert f"| parameters | {encoder:,} in the encoder |" in card
    assert "width 16, 2 blocks, 2 heads" in card
    assert f"{image_size[0]}x{image_size[1]} pixels [height x width], {channels} channel" in card
    assert "mean " + ", ".join(f"{value:.8g}" for value in model.description.mean) in card
    assert "until the image just covers {}x{} pixels".format(*(int(side / 0.9) for side in image_size)) in card
    assert "None is stated." in card
    assert "license:" in card
    # Nothing is known about the training, and nothing is made up.
    assert not any(word in card for word in ("## Results", "## Reconstructions", "epochs", "seed |", "fingerprint"))


def test_a_card_names_the_temperature_of_positions_that_are_not_the_published_ones(tmp_path: Path) -> None:
    warm = replace(SQUARE, position_temperature=10.0)
    cards = [card_of(autoencoder(each, (8, 8), 3), tmp_path / str(n)) for n, each in enumerate((SQUARE, warm))]
    assert ["| positions | sine-cosine, of temperature 10 when" in card for card in cards] == [False, True]


def test_the_card_of_a_run_tells_how_it_was_trained_and_nothing_of_the_machine(tmp_path: Path) -> None:
    model = in_run(autoencoder(SQUARE, (8, 8), 3), tmp_path / "secret")
    card = card_of(model, tmp_path / "out")
    for line in (
        "| epochs | 5 of 20 |", "| steps | 40 |", "| images per step | 8 |", "| training samples | 64 |",
        "| seed | 3 |",
        f"| fingerprint of the samples | `{'f' * 64}` |", "| began with | the weights of first |",
        "| hidden patches | 75 %, random mask |", "| decoder | self-attention: width 12, 1 block, 3 heads |",
        "| area of random crops | 0.6 to 1 |", "| learning rate per 256 images | 0.001 |",
    ):  # fmt: skip
        assert line in card
    assert "not trained" not in card
    assert "RandAugment" not in card
    for private in ("alice", "secret", "/home", str(tmp_path)):
        assert private not in card
    assert (tmp_path / "out" / "reconstructions.png").read_bytes() == b"picture of 40"
    assert "drawn after step 40" in card


def test_equal_models_give_equal_folders(tmp_path: Path) -> None:
    model = in_run(autoencoder(SQUARE, (8, 8), 3), tmp_path / "run")
    folders = [export(model, "timm", tmp_path / name).folder for name in ("a", "b")]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert "reconstructions.png" in files[0]


def test_a_checkpoint_is_described_as_of_its_own_step(tmp_path: Path) -> None:
    measured = [
        {"kind": "evaluation", "step": step, "samples": 9, "knn": step / 100, "loss": None} for step in (30, 60)
    ]
    name = "checkpoints/step-000000040/model.safetensors"
    facts = facts_of(in_run(autoencoder(SQUARE, (8, 8), 3), tmp_path / "run", name, measured))
    assert (facts.step, facts.samples, facts.epoch) == (40, 64, 5.0)
    assert [(result.protocol, result.figures) for result in facts.results] == [("k-NN accuracy", "30.0 %")]


def test_classes_are_listed_and_long_lists_are_cut(tmp_path: Path) -> None:
    card = card_of(classifier("linear"), tmp_path / "few")
    assert "0: cat, 1: dog, 2: red panda\n" in card
    assert "pipeline_tag: image-classification" in card
    many = classifier("linear")
    weights = {name: tensor for name, tensor in many.weights.items() if not name.startswith("head.")}
    weights |= {"head.weight": torch.zeros(60, 16) + 0.1, "head.bias": torch.zeros(60)}
    description = replace(many.description, classes=tuple(f"<b>|{number}`" for number in range(60)))
    card = card_of(trained(weights, description), tmp_path / "many")
    assert "49: &lt;b&gt;&#124;49', and 10 more, 60 in all" in card
    assert "50: " not in card
    assert "## Classes" not in card_of(classifier("mlp"), tmp_path / "without")


def test_results_are_those_of_this_very_file(tmp_path: Path) -> None:
    model = in_run(classifier("linear"), tmp_path / "run")
    digest = hashlib.sha256(model.path.read_bytes()).hexdigest()

    def row(encoder: str, accuracy: float, **about: str) -> dict[str, Any]:
        return {"encoder": encoder, "protocol": "knn", "top1": {"mean": accuracy, "deviation": 0.01}, "about": about}

    rows = [row("pixels 8x8", 0.5), row("other", 0.9, sha256="0" * 64), row("/home/alice/run", 0.75, sha256=digest)]
    content = {"rows": rows, "test": {"samples": 11, "fingerprint": "e" * 64, "shards": ["/home/alice/x"]}}
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "results.json").write_text(json.dumps(content))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"rows": 3}')
    card = card_of(model, tmp_path / "out")
    expected = (
        f"| this model | knn | top-1 75.0 % ± 1.0 | 11 samples (fingerprint {'e' * 12}) |  |\n| pixels 8x8 | knn |"
    )
    assert expected in card
    assert "other" not in card
    assert "alice" not in card


@pytest.mark.parametrize("selected", [False, True])
def test_an_accuracy_on_the_samples_that_chose_the_model_is_marked(selected: bool, tmp_path: Path) -> None:
    accuracies = [{"kind": "eval", "step": step, "accuracy": step / 100, "samples": 11} for step in (20, 40)]
    model = in_run(classifier("mlp"), tmp_path / "run", records=accuracies)
    if selected:
        metadata = model.description.metadata() | Selection("e" * 64, 20, 0.2).metadata()
        model = replace(model, path=tmp_path / "run" / "best.safetensors")
        write_weights(model.path, model.weights, metadata)
    card = card_of(model, tmp_path / "out")
    assert ("20.00 %" in card) == selected
    assert ("40.00 %" in card) == (not selected)
    assert ("selected on this set" in card) == selected
    assert "with the head, which is left behind" in card


def test_a_damaged_run_costs_facts_but_no_export(tmp_path: Path) -> None:
    model = in_run(autoencoder(SQUARE, (8, 8), 3), tmp_path / "run")
    for name in ("settings.yaml", "metrics.jsonl", "checkpoints/step-000000040/manifest.json"):
        (tmp_path / "run" / name).write_bytes(b"\xff{")
    card = card_of(model, tmp_path / "out")
    assert "stage | pretraining" in card
    assert "steps" not in card


def test_absurd_numbers_cost_facts_but_no_export(tmp_path: Path) -> None:
    model = in_run(autoencoder(SQUARE, (8, 8), 3), tmp_path / "run")
    run, digest = tmp_path / "run", hashlib.sha256((tmp_path / "run" / "model.safetensors").read_bytes()).hexdigest()
    (run / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"epochs": 10**400}))
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 40, "epoch": 1e-308}\n')
    (run / "evaluation").mkdir()
    measures = {"mean": 10**400, "deviation": 0.1}
    rows = [{"encoder": "run", "protocol": "knn", "top1": measures, "about": {"sha256": digest}}]
    (run / "evaluation" / "results.json").write_text(json.dumps({"rows": rows, "test": {}}))
    card = card_of(model, tmp_path / "out")
    assert "| steps | 40 |" in card
    assert "training samples" not in card
    assert "top-1" not in card


def test_a_card_that_the_user_has_changed_stays_and_a_missing_one_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, card = autoencoder(SQUARE, (8, 8), 3), tmp_path / "out" / "README.md"
    written = card_of(model, tmp_path / "out")
    card.write_text(written.replace("# license: not stated; see the last section", "license: cc0-1.0"))
    assert "license: cc0-1.0" in card_of(model, tmp_path / "out")
    card.unlink()
    assert card_of(model, tmp_path / "out") == written


def test_an_export_that_normalises_says_so() -> None:
    proof = {"inputs": "images", "tolerance": 1e-4, "outputs": [], "versions": {}}
    texts = {name: card_text(TARGETS[name], classifier("linear"), Facts({}), proof) for name in ("timm", "onnx_uint8")}
    assert "3. Divide by 255 (the model does this itself)." in texts["onnx_uint8"]
    assert "`images` is a float32 tensor" not in texts["onnx_uint8"]
    assert "3. Divide by 255.\n" in texts["timm"]
    assert "`images` is a float32 tensor [batch, 3, 8, 8]" in texts["timm"]
