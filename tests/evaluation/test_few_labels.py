"""Accuracies with few labels, without fine-tuning: each row has the labels that fine-tuning has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_shards

from mae.data.eval_batches import labelled_subset
from mae.data.prepare import open_shards
from mae.data.settings import DataSettings
from mae.evaluation import few_labels
from mae.evaluation.feature_set import FeatureSet
from mae.evaluation.few_labels import FROZEN, PROBED_PIXELS, SEPARATED_PIXELS, UNTRAINED, frozen_cells
from mae.evaluation.protocols.outcome import Outcome
from mae.inference.model import Model, load
from mae.models.description import describe_model
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.models.weights import file_tensors, write_weights


@pytest.fixture
def model(tmp_path: Path) -> Model:
    settings = EncoderSettings(width=16, depth=1, heads=2, patch_size=(4,))
    description = describe_model("masked autoencoder", settings, (8, 8), (0.5,), (0.3,), 1.0)
    torch.manual_seed(7)
    write_weights(tmp_path / "m.safetensors", file_tensors(build_encoder(settings, (8, 8), 1)), description.metadata())
    return load(tmp_path / "m.safetensors", "cpu")


def test_each_row_is_fitted_on_the_labels_of_the_seed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[FeatureSet] = []

    def judge(known: FeatureSet, asked: FeatureSet, classes: int, seed: int, **rest: Any) -> Outcome:
        """Call all samples of the class `seed`."""
        fitted.append(known)
        assert len(asked) == 21
        return Outcome(np.eye(classes)[np.full(len(asked), seed)], True, len(known), {})

    monkeypatch.setattr(few_labels.linear, "judge", judge)
    monkeypatch.setattr(few_labels, "_separate", judge)
    train, test = (str(write_shards(tmp_path / name, [count])) for name, count in (("train", 40), ("test", 21)))
    cells = frozen_cells(model, [train], [test], {"two": 2, "all": None}, 2)
    rows = (FROZEN, UNTRAINED, PROBED_PIXELS, SEPARATED_PIXELS)
    assert [(cell.encoder, cell.labels) for cell in cells] == [(row, name) for row in rows for name in ("two", "all")]
    # Of 21 samples in turns of four classes, six are of the class 0.
    assert {cell.accuracies for cell in cells} == {(6 / 21, 5 / 21)}
    data = DataSettings(shards=(train,), image_size=(8,), channels=1)
    index = open_shards(data.shards, data, lambda text: None)
    two = [labelled_subset(index, 2, seed) for seed in (0, 1)]
    frozen, untrained, *plain = (fitted[at : at + 4] for at in range(0, 16, 4))
    for row in (frozen, untrained, *plain):
        assert [len(known) for known in row] == [8, 8, 40, 40]
        for ids, known in zip(two, row[:2], strict=True):
            assert known.labels.tolist() == index.label[ids].tolist()
    for row in (frozen, *plain):
        assert all(np.array_equal(row[2].values[ids], known.values) for ids, known in zip(two, row[:2], strict=True))
    assert not np.array_equal(untrained[2].values, untrained[3].values)  # each seed has an encoder of its own
    assert not np.array_equal(frozen[2].values, untrained[2].values)
