import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from export.models import MODELS, RECTANGLE, SQUARE, export, pretrained, trained
from mae.errors import UserError
from mae.export.timm import timm_config
from mae.models.classifier import build_classifier
from mae.models.description import describe_model, find_model, read_description
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.sizes import SIZES
from mae.models.weights import file_tensors, read_weights
from mae.pipelines.export import ExportSettings, run
from mae.training.checkpoints.manifest import DataPosition, RunPosition, step_folder
from mae.training.checkpoints.writer import CheckpointWriter


def load(folder: Path, **arguments: Any) -> VisionTransformer:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


@pytest.mark.parametrize(("settings", "image_size", "channels"), MODELS)
def test_timm_computes_the_same_features(
    tmp_path: Path, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int
) -> None:
    model, weights, description = pretrained(settings, image_size, channels)
    exported = export(trained(weights, description), "timm", tmp_path / "out")
    images = torch.randn(3, channels, *image_size)
    with torch.no_grad():
        ours, theirs = model.encoder(images), load(tmp_path / "out")(images)
    assert 0 <= exported.greatest_difference <= 1e-6
    assert theirs.shape == (3, 16)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("settings", "image_size", "channels"), MODELS)
def test_timm_adds_a_head_for_other_classes(
    tmp_path: Path, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int
) -> None:
    model, weights, description = pretrained(settings, image_size, channels)
    export(trained(weights, description), "timm", tmp_path / "out")
    theirs = load(tmp_path / "out", num_classes=10)
    images = torch.randn(2, channels, *image_size)
    assert theirs(images).shape == (2, 10)
    expected = model.encoder.forward_features(images)
    torch.testing.assert_close(theirs.forward_features(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("settings", "image_size", "channels"), MODELS)
def test_timm_resamples_the_positions_for_another_image_size(
    tmp_path: Path, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int
) -> None:
    model, weights, description = pretrained(settings, image_size, channels)
    if model.grid[0] != model.grid[1]:
        pytest.importorskip("timm", "1.0.31", reason="earlier timm resamples squares only")
    export(trained(weights, description), "timm", tmp_path / "out")
    theirs = load(tmp_path / "out", img_size=(16, 24))
    assert theirs(torch.randn(2, channels, 16, 24)).shape == (2, 16)
    resampled = resample_abs_pos_embed(
        weights["pos_embed"], list(settings.grid((16, 24))), list(model.grid), num_prefix_tokens=1
    )
    torch.testing.assert_close(theirs.pos_embed, torch.nn.Parameter(resampled))
    for name, tensor in theirs.state_dict().items():
        assert name == "pos_embed" or torch.equal(tensor, weights[name]), name


def test_timm_is_told_how_images_were_normalised(tmp_path: Path) -> None:
    _, weights, description = pretrained(RECTANGLE, (8, 12), 1)
    export(trained(weights, description), "timm", tmp_path / "out")
    config = timm.data.resolve_model_data_config(load(tmp_path / "out"))
    assert config["mean"] == pytest.approx(description.mean)
    assert config["std"] == pytest.approx(description.std)
    assert config["crop_pct"] == 0.9
    assert tuple(config["input_size"]) == (1, 8, 12)
    # timm before 1.0.31 reads the size from here.
    written = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (written["input_size"], written["fixed_input_size"]) == ([1, 8, 12], True)


def test_the_folder_holds_the_encoder_alone_and_its_description(tmp_path: Path) -> None:
    model, weights, description = pretrained(SQUARE, (8, 8), 3)
    export(trained(weights, description), "timm", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "verification.json",
    ]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(model.encoder.state_dict())
    assert not [name for name in written if "decoder" in name or "mask_token" in name or "head" in name]
    assert read_description(tmp_path / "out" / "model.safetensors") == replace(description, decoder=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_encoder_of_a_classifier_is_exported_without_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = build_classifier(SQUARE, (8, 8), 3, 5, "mlp")
    description = describe_model("classifier", SQUARE, (8, 8), (0.5,) * 3, (0.5,) * 3, 1.0)
    export(trained(file_tensors(classifier), description), "timm", tmp_path / "out")
    images = torch.randn(2, 3, 8, 8)
    features = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(load(tmp_path / "out")(images), features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_export_of_a_model_trained_in_mixed_precision_is_in_float32_n09(tmp_path: Path, dtype: torch.dtype) -> None:
    model, _, description = pretrained(SQUARE, (8, 16), 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 5, 8, 16, generator=generator)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, torch.rand(4, model.patches, generator=generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Training keeps its weights in float32; a file of another program's making may hold fewer bits.
    weights = {name: tensor.to(dtype) for name, tensor in file_tensors(model).items()}
    export(trained(weights, description), "timm", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    model.encoder.load_state_dict({name: weights[name].float() for name in model.encoder.state_dict()})
    with torch.no_grad():
        theirs = load(tmp_path / "out")(images)
        torch.testing.assert_close(theirs, model.encoder(images), rtol=0, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            as_trained = model.encoder(images).float()
    # Normed features have a deviation of 1, and bfloat16 keeps 8 bits of each number.
    torch.testing.assert_close(theirs, as_trained, rtol=0, atol=0.05)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    _, weights, description = pretrained(SQUARE, (8, 8), 3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(UserError, match=rf"{out} exists and is not an empty folder"):
            export(trained(weights, description), "timm", out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "notes.txt"]


def test_an_empty_folder_and_the_rest_of_a_killed_export_are_replaced(tmp_path: Path) -> None:
    _, weights, description = pretrained(SQUARE, (8, 8), 3)
    for folder in ("out", ".out.part"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".out.part" / "other.safetensors").write_bytes(b"half")
    export(trained(weights, description), "timm", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "out",
        "verification.json",
    ]


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_an_export_that_timm_computes_differently_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    def damaged(folder: str, **arguments: Any) -> VisionTransformer:
        model = create_model(folder, **arguments)
        model.norm.bias.data[0] += change
        return model

    create_model = timm.create_model
    monkeypatch.setattr("mae.export.timm.timm.create_model", damaged)
    _, weights, description = pretrained(SQUARE, (8, 8), 3)
    with pytest.raises(UserError, match=r"the tokens of the export to timm differ by .*; nothing was exported"):
        export(trained(weights, description), "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_the_described_model_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    _, weights, _ = pretrained(SQUARE, (8, 8), 3)
    _, _, description = pretrained(SQUARE, (8, 16), 3)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 5, 16\] instead of \[1, 9, 16\]"):
        export(trained(weights, description), "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changed", [{}, {"depth": 1, "heads": 1}])
def test_timms_entry_and_our_arguments_make_each_size(size: Any, changed: dict[str, int]) -> None:
    settings = EncoderSettings(size=size, **changed)
    description = describe_model("masked autoencoder", settings, (32, 64), (0.5,) * 3, (0.5,) * 3, 1.0)
    config = json.loads(json.dumps(timm_config(description)))
    with torch.device("meta"):
        ours = build_encoder(settings, (32, 64), 3)
        theirs = timm.create_model(config["architecture"], **config["model_args"], num_classes=0)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == shapes
    assert theirs.blocks[0].attn.num_heads == settings.shape.heads
    assert config["num_features"] == theirs.num_features
    assert changed or config["architecture"].startswith(f"vit_{size}_patch")


@pytest.mark.parametrize(("settings", "image_size", "channels"), MODELS)
def test_transformers_loads_the_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: MaskedAutoencoderSettings,
    image_size: tuple[int, int],
    channels: int,
) -> None:
    from transformers import AutoModel

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, weights, description = pretrained(settings, image_size, channels)
    export(trained(weights, description), "timm", tmp_path / "out")
    theirs, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    images = torch.randn(2, channels, *image_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images).pooler_output, model.encoder(images), rtol=0, atol=1e-6)


def save_checkpoint(writer: CheckpointWriter, step: int, model: dict[str, Tensor]) -> None:
    """With the weights of another model all over again as optimiser state."""
    _, _, description = pretrained(SQUARE, (8, 8), 3)
    run_position = RunPosition(step, DataPosition(step, "fingerprint", 1), {}, {})
    writer.save({"model": model, "optimizer": model}, description.metadata(), run_position)


def test_a_checkpoint_of_a_run_in_progress_is_exported_whole_or_not_at_all_c19(tmp_path: Path) -> None:
    """A thread saves and removes checkpoints as fast as it can, each filled with its own step."""
    root = tmp_path / "checkpoints"
    _, weights, _ = pretrained(SQUARE, (8, 8), 3)

    def train() -> None:
        writer = CheckpointWriter(root, keep=1)
        for step in range(1, 60):
            save_checkpoint(writer, step, {name: torch.full_like(weights[name], step) for name in weights})
        writer.close()

    trainer = threading.Thread(target=train)
    trainer.start()
    seen, missed = set[int](), set[str]()
    while trainer.is_alive():
        for folder in root.glob("step-*"):
            try:
                path = find_model(folder)
                found, description = read_weights(path), read_description(path)
            except UserError as error:
                missed.add(str(error).replace(folder.name, "").replace("\n", "a second line"))
                continue
            (value,) = {float(value) for tensor in found.values() for value in tensor.unique()}
            assert folder.name == f"step-{value:09.0f}"
            assert found.keys() == weights.keys()
            assert description.width == 16
            seen.add(int(value))
    assert len(seen) > 1
    # Removed between two looks: said in one line.
    assert all("does not exist" in text and "a second line" not in text for text in missed), missed


def test_a_checkpoint_is_exported_like_a_finished_run_c19(tmp_path: Path) -> None:
    model, weights, _ = pretrained(SQUARE, (8, 8), 3)
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", keep=2)
    save_checkpoint(writer, 1, weights)
    writer.close()
    (exported,) = run(ExportSettings(step_folder(tmp_path / "run" / "checkpoints", 1), out=tmp_path / "out"))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load(exported.folder)(images), model.encoder(images), rtol=0, atol=1e-6)


def test_a_checkpoint_that_is_not_yet_whole_is_never_exported_c19(tmp_path: Path) -> None:
    _, weights, _ = pretrained(SQUARE, (8, 8), 3)
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", keep=2)
    save_checkpoint(writer, 1, weights)
    writer.close()
    whole = step_folder(tmp_path / "run" / "checkpoints", 1)
    # As it stood a moment ago, all but renamed.
    half = whole.rename(whole.with_name(".tmp-000000001-launch.1"))
    for source in (half, tmp_path / "run"):
        with pytest.raises(UserError, match=r"give .*"):
            run(ExportSettings(source, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
