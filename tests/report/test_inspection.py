"""A run with a model and shards, without any training: every part of its page."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae.inference.model import load
from mae.report.class_results import Confusion, class_tables, read_evaluation
from mae.report.inspection import inspect
from mae.report.model_pictures import compare_with_pixels, patch_features, see
from mae.report.reading import read_run
from mae.report.run import report
from mae.report.run_images import open_images
from mae.training.run_folder.folder import RunFolder
from tests.report.conftest import NAMES

CPU = torch.device("cpu")


def section(sections: list[tuple[str, str]], title: str) -> str:
    return dict(sections)[title]


def test_a_pretraining_with_all_its_pictures(pretrained: RunFolder) -> None:
    run = read_run(pretrained.path)
    found = inspect(run, CPU)
    pictures = section(found.sections, "What the model sees")
    # 6 images, each with its patch features, all heads and 2 heads; 3 masks; and 6 neighbours.
    assert pictures.count("<img") == 6 * (1 + 1 + 1 + 2) + 6 * (1 + 2 * 3) + 6 * (1 + 6)
    for title in ("50% hidden", "75% hidden", "90% hidden", "head 2", "most similar"):
        assert title in pictures
    data = section(found.sections, "Data")
    assert data.count("4 classes, from") == 2
    assert "Each of 24 images looked at has 8x8 pixels." in data
    assert "&lt;b&gt;bee&lt;/b&gt;" in data
    assert found.neighbours is not None
    assert found.neighbours.samples == 20
    text = report([run], CPU)
    assert "<b>bee" not in text
    assert len(text) < 400_000
    assert text.count("<img") == text.count('src="data:image/')


def test_a_classifier_with_its_mistakes(tuned: RunFolder) -> None:
    found = inspect(read_run(tuned.path), CPU)
    text = section(found.sections, "Classes")
    model = load(tuned.path)
    images = open_images(read_run(tuned.path), read_run(tuned.path).texts("eval_shards"))
    predicted = model.logits([data for _, _, data in images.read(images.spread(24))]).argmax(dim=1).numpy()
    right = (predicted == images.index.label).mean()
    assert f"{100 * right:.3g} % of 24 validation images are classified correctly." in text
    assert text.count("<img") == min(14, (predicted != images.index.label).sum())
    assert "<b>bee" not in text
    assert "the same masks" not in section(found.sections, "What the model sees")


def test_patch_features_are_those_of_the_patches(pretrained: RunFolder) -> None:
    """An image that changes in one patch, at a model without blocks in between, changes there."""
    model = load(pretrained.path)
    with torch.no_grad():
        for block in model.encoder.blocks:
            for parameter in block.parameters():
                parameter.zero_()
    views = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    views[1, 0, 2:4, 6:8] = torch.tensor([[0, 255], [255, 0]])
    features = patch_features(model, views)
    changed = (features[0] - features[1]).abs().sum(dim=-1) > 1e-4
    assert changed.nonzero().tolist() == [[1, 3]]


def test_nearest_neighbours_by_features_and_pixels(pretrained: RunFolder) -> None:
    run = read_run(pretrained.path)
    seen = see(load(pretrained.path), open_images(run, run.texts("data.shards")), 24)
    labels = torch.tensor([int(name == "ant") for name in seen.classes]).float()[:, None]
    perfect = seen._replace(
        features=torch.nn.functional.one_hot(torch.tensor([NAMES.index(name) for name in seen.classes])).float(),
        views=(labels[:, :, None, None] * 255).to(torch.uint8).expand(-1, 1, 8, 8),
    )
    found = compare_with_pixels(perfect)
    assert found is not None
    assert found.features == 1
    assert found.pixels < 1
    assert compare_with_pixels(seen._replace(classes=[""] * len(seen.classes))) is None


def test_data_that_are_gone_leave_a_sentence(pretrained: RunFolder) -> None:
    run = read_run(pretrained.path)
    for path in (pretrained.path.parent / "shards").glob("*.tar"):
        path.unlink()
    found = inspect(run, CPU)
    assert "Pictures from the model are left out: " in section(found.sections, "What the model sees")
    assert "Counts and pictures are left out: " in section(found.sections, "Data")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("s3://bucket/train-*.tar", "the shards are remote, and a report fetches nothing"),
        ("nowhere/train-*.tar", "nowhere/train-*.tar"),
        ("", "the settings name no shards"),
    ],
)
def test_shards_that_cannot_be_read(pretrained: RunFolder, setting: str, sentence: str) -> None:
    run = read_run(pretrained.path)
    shards = {"data.shards": [setting] if setting else [], "evaluation.eval_shards": []}
    found = inspect(replace(run, settings=run.settings | shards), CPU)
    assert sentence in section(found.sections, "What the model sees")


def test_damaged_models_leave_a_sentence(pretrained: RunFolder) -> None:
    pretrained.model.write_bytes(pretrained.model.read_bytes()[:-100])
    text = section(inspect(read_run(pretrained.path), CPU).sections, "What the model sees")
    assert "Pictures from the model are left out: " in text
    pretrained.model.unlink()
    text = section(inspect(read_run(pretrained.path), CPU).sections, "What the model sees")
    assert "neither a model nor a checkpoint is in the folder of the run" in text


MODEL = b"weights"


def results(**changed: Any) -> dict[str, Any]:
    other, own = ({"model": "a", "sha256": hashlib.sha256(data).hexdigest()} for data in (b"other", MODEL))
    rows = [
        {"encoder": "runs/b", "protocol": "knn", "top1": {"mean": 0.9}, "confusion": None, "about": other},
        {"encoder": "runs/b", "protocol": "head", "top1": {"mean": 1}, "confusion": [[4, 0], [0, 4]], "about": other},
        {"encoder": "runs/a", "protocol": "knn", "top1": {"mean": 0.8}, "confusion": None, "about": own},
        {"encoder": "pixels 8x8", "protocol": "knn", "top1": {"mean": 0.85}, "confusion": None, "about": {}},
        {"encoder": "runs/a", "protocol": "head", "top1": {"mean": 0.5}, "confusion": [[3, 1], [3, 1]], "about": own},
    ]
    return {"classes": ["ant", "bee"], "rows": rows, "test": {"samples": 8}} | changed


def test_results_of_mae_evaluate(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    path = tmp_path / "evaluation" / "results.json"
    path.write_text(json.dumps(results()))
    model = tmp_path / "model.safetensors"
    model.write_bytes(MODEL)
    found = read_evaluation(tmp_path, model)
    assert found.neighbours is not None
    assert found.neighbours[:3] == (0.8, 0.85, 8)
    assert found.confusion is not None
    text = class_tables(found.confusion)
    assert "50 % of 8 test images (mae evaluate) are classified correctly." in text
    assert "ant (3)" in text
    counts = (results(test={"samples": samples}) for samples in (float("inf"), 10**400))
    for damaged in (results(rows=3), results(classes=None), [], "{", "[" * 60_000, *counts):
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        assert read_evaluation(tmp_path, model) == (None, None)


def test_results_of_another_model_are_not_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    path, model = tmp_path / "evaluation" / "results.json", tmp_path / "model.safetensors"
    path.write_text(json.dumps(results()))
    model.write_bytes(b"trained anew")
    assert read_evaluation(tmp_path, model) == (None, None)
    assert read_evaluation(tmp_path, None) == (None, None)


def test_many_classes_have_no_matrix() -> None:
    counts = np.full((40, 40), 1, dtype=np.int64) + 5 * np.eye(40, dtype=np.int64)
    text = class_tables(Confusion([f"class {number}" for number in range(40)], counts, "40 images"))
    assert 'class="matrix"' not in text
    assert "All 40 classes" in text
