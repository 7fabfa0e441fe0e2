"""A folder of transformers with its own code holds every classifier."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mae
from export.models import RECTANGLE, SQUARE, autoencoder, classifier, export
from export.test_transformers import photo
from mae.errors import UserError
from mae.models.classifier import HeadKind
from mae.models.vit import TokenKind

pytestmark = pytest.mark.usefixtures("offline")


def load_with_code(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForImageClassification

    theirs, report = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return theirs.eval()


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_every_head_on_every_token_computes_the_same_logits(tmp_path: Path, head: HeadKind, pool: TokenKind) -> None:
    model = classifier(head, pool)
    exported = export(model, "transformers_code", tmp_path / "out")
    theirs = load_with_code(tmp_path / "out")
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, model.logits(images), rtol=0, atol=1e-5)
        (logits,) = theirs(images, return_dict=False)
    assert torch.equal(logits, theirs(images).logits)
    assert list(exported.left_behind) == []
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "red panda"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_usual_kinds_of_attention_can_be_asked_for(tmp_path: Path, attention: str) -> None:
    model = classifier("mlp", "cls")
    export(model, "transformers_code", tmp_path / "out")
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        asked = load_with_code(tmp_path / "out", attn_implementation=attention)(images).logits
    torch.testing.assert_close(asked, model.logits(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("settings", "image_size", "channels"), [(RECTANGLE, (8, 12), 1), (SQUARE, (32, 96), 5)])
def test_rectangles_and_any_channels_go_too(
    tmp_path: Path, settings: Any, image_size: tuple[int, int], channels: int
) -> None:
    model = classifier("mlp", "avg", settings, image_size, channels)
    export(model, "transformers_code", tmp_path / "out")
    images = torch.randn(3, channels, *image_size)
    theirs = load_with_code(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, model.logits(images), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"images are \(8, 8\), this model reads"):
        theirs(torch.zeros(1, channels, 8, 8))


def test_the_pipeline_finds_our_class_in_a_photo(tmp_path: Path) -> None:
    from transformers import pipeline

    model = classifier("mlp", "cls+avg", image_size=(32, 32))
    export(model, "transformers_code", tmp_path / "out")
    theirs = pipeline("image-classification", str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    ours = mae.load(model.path, device="cpu")
    data = photo(70, 50, "jpeg")
    probabilities = ours.logits([data]).softmax(dim=1)[0].tolist()
    found = theirs(Image.open(io.BytesIO(data)))
    expected = dict(zip(ours.classes, probabilities, strict=True))
    # The crop may be one pixel further up or left.
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=2e-2)
    assert found[0]["label"] == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("allowed", [{}, {"trust_remote_code": False}])
@pytest.mark.parametrize("auto_class", ["AutoModelForImageClassification", "AutoModel", "AutoConfig"])
def test_without_leave_for_its_code_the_folder_is_refused(
    tmp_path: Path, auto_class: str, allowed: dict[str, bool]
) -> None:
    """A model of a kind that transformers knows would get a random head in place of ours."""
    import transformers

    export(classifier("mlp"), "transformers_code", tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        getattr(transformers, auto_class).from_pretrained(tmp_path / "out", **allowed)


def test_the_model_trains_and_is_saved_again(tmp_path: Path) -> None:
    model = classifier("mlp", "avg")
    export(model, "transformers_code", tmp_path / "out")
    theirs = load_with_code(tmp_path / "out").train()
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    output = theirs(images, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_mae.py").is_file()
    again = load_with_code(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model.logits(images), rtol=0, atol=1e-5)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no head; export its encoder to transformers"):
        export(autoencoder(SQUARE, (8, 8), 3), "transformers_code", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_holds_its_code_which_needs_torch_and_transformers_alone(tmp_path: Path) -> None:
    export(classifier("mlp"), "transformers_code", tmp_path / "out")
    names = {"config.json", "model.safetensors", "modeling_mae.py", "preprocessor_config.json"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    lines = (tmp_path / "out" / "modeling_mae.py").read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"collections", "typing", "torch", "transformers"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["head"] == "mlp"
