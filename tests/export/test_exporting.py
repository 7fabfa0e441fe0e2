"""What all exports share: targets are chosen and checked before anything is written, and outputs are compared."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torchvision.models import VisionTransformer

import mae
from export.models import RECTANGLE, SQUARE, autoencoder, classifier
from mae.errors import UserError
from mae.export import exporting, targets
from mae.export.exporting import export_model
from mae.export.safetensors import Safetensors
from mae.export.target import Difference, compare
from mae.export.trained_model import TrainedModel, read_trained_model
from mae.formats.opening import open_model
from mae.pipelines import export as command
from mae.pipelines.export import ExportSettings, run


def said(model: TrainedModel, to: Sequence[str], out: Path) -> list[str]:
    lines: list[str] = []
    export_model(model, to, out, lines.append)
    return lines


def test_one_target_fills_the_folder_and_several_have_one_each(tmp_path: Path) -> None:
    model = autoencoder(SQUARE, (8, 8), 3)
    said(model, ["timm"], tmp_path / "one")
    said(model, ["timm", "safetensors"], tmp_path / "two")
    assert (tmp_path / "one" / "config.json").is_file()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["safetensors", "timm"]


def test_the_current_folder_is_filled_if_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said(autoencoder(SQUARE, (8, 8), 3), ["safetensors"], Path())
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_target_that_is_refused_stops_all_before_the_first_is_written(tmp_path: Path) -> None:
    model = autoencoder(RECTANGLE, (8, 12), 1)
    with pytest.raises(UserError, match=r"torchvision cannot hold .*: its images have 1 channels"):
        said(model, ["timm", "torchvision"], tmp_path / "out")
    (tmp_path / "used" / "timm").mkdir(parents=True)
    (tmp_path / "used" / "timm" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"used/timm exists and is not an empty folder"):
        said(model, ["safetensors", "timm"], tmp_path / "used")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["timm"]


def test_all_means_every_target_that_can_be_written_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Safetensors):
        name = "other"
        requires = ("a-package-that-nobody-has>=2", "packaging>=999")

    quick = {name: targets.TARGETS[name] for name in ("timm", "torchvision", "safetensors")} | {"other": Other()}
    monkeypatch.setattr(exporting, "TARGETS", quick)
    model = autoencoder(RECTANGLE, (8, 12), 1)
    lines = said(model, ["all"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["safetensors", "timm"]
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert "torchvision cannot hold" in left_out[0]
    assert (
        "needs a-package-that-nobody-has>=2, packaging>=999; a-package-that-nobody-has is missing, pack" in left_out[1]
    )
    with pytest.raises(UserError, match=r"pip install 'mae-pretraining\[export\]'"):
        said(model, ["other"], tmp_path / "other")
    with pytest.raises(UserError, match=r"to is tim; allowed: timm, torchvision, safetensors, other, all"):
        said(model, ["tim"], tmp_path / "other")


def test_a_model_whose_outputs_are_not_finite_is_refused(tmp_path: Path) -> None:
    model = autoencoder(SQUARE, (8, 8), 3)
    broken = replace(model, weights={**model.weights, "norm.bias": torch.full((16,), float("nan"))})
    with pytest.raises(UserError, match=r"the tokens of the model itself are not finite; nothing was exported. Its w"):
        said(broken, ["timm"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_another_output_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    def other(self: Safetensors, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        yield compare("tokens", model.tokens(model.images(1)), model.tokens(model.images(1)) + change)

    monkeypatch.setattr(Safetensors, "compare", other)
    with pytest.raises(UserError, match=r"the tokens of the export to safetensors differ by .* nothing was exported"):
        said(autoencoder(SQUARE, (8, 8), 3), ["safetensors"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_another_shape_are_never_equal() -> None:
    assert not compare("logits", torch.ones(2, 3), torch.ones(2, 1)).is_within(1e9)
    assert compare("logits", torch.zeros(2), torch.zeros(2)).is_within(1e-6)


def test_what_is_left_behind_is_said_with_the_targets_that_hold_it(tmp_path: Path) -> None:
    (line,) = [line for line in said(classifier("mlp"), ["timm"], tmp_path / "a") if "left behind" in line]
    assert "the head (4 tensors: head.fc1.weight" in line
    assert "transformers_code" in line
    assert "onnx" in line
    proof = json.loads((tmp_path / "a" / "verification.json").read_text())
    assert sorted(proof["left_behind"]) == ["head.fc1.bias", "head.fc1.weight", "head.fc2.bias", "head.fc2.weight"]
    (line,) = [line for line in said(autoencoder(SQUARE, (8, 8), 3), ["timm"], tmp_path / "b") if "left behind" in line]
    assert "the decoder (" in line
    assert "vit_mae or mae holds" in line


def test_a_loaded_model_exports_itself(tmp_path: Path) -> None:
    model = classifier("linear")
    loaded = mae.load(model.path, "cpu")
    (exported,) = loaded.export(["timm"], tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    images = model.images(2)
    torch.testing.assert_close(theirs(images), model.logits(images), rtol=0, atol=0)
    proof = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert proof["model"] == {"file": "model.safetensors", "sha256": loaded.sha256}


def test_a_model_of_another_library_is_exported_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True, model_args=sizes)
    model = read_trained_model(tmp_path / "theirs")
    said(model, ["torchvision"], tmp_path / "torchvision")
    weights = torch.load(tmp_path / "torchvision" / "model.pth", weights_only=True)
    again = VisionTransformer(8, 4, 2, 2, 16, 64, num_classes=3).eval()
    again.load_state_dict(weights)
    images = model.images(2)
    with torch.no_grad():
        torch.testing.assert_close(again(images), theirs(images), rtol=1e-5, atol=1e-6)


def test_a_model_that_does_not_say_how_its_images_are_prepared_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare.pth does not say how its images were normalised"):
        read_trained_model(tmp_path / "bare.pth")


def test_the_command_takes_what_a_file_does_not_say_and_reports_its_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=0)
    torch.save(theirs.state_dict() | {"fc.weight": torch.zeros(3, 16)}, tmp_path / "bare.pth")
    words = [str(tmp_path / "bare.pth"), "--to", "safetensors", "--out", str(tmp_path / "out")]
    command.main([*words, "--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--heads", "2"])
    assert open_model(tmp_path / "out").description.mean == (0.1, 0.2, 0.3)
    assert "1 left out (head of another kind)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        command.main([*words[:2], "--mean", *"111", "--std", *"111", "--heads", "2"])
    assert end.value.code == 2
    assert "to names no target; allowed: timm, " in capsys.readouterr().err


def test_under_a_launcher_the_first_process_does_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = autoencoder(SQUARE, (8, 8), 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(ExportSettings(model.path, out=tmp_path / "out")) == []
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert [each.target for each in run(ExportSettings(model.path, out=tmp_path / "out"))] == ["timm"]
