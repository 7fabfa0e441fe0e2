"""Folders of runs with a small random model and the shards that it is for; nothing is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mae.data.settings import DataSettings
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.description import describe_model
from mae.models.settings import EncoderSettings, MaskedAutoencoderSettings
from mae.models.weights import file_tensors
from mae.settings import dump
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.online import OnlineEvaluationSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.run_folder.folder import RunFolder
from tests.report.runs import make_finetuning, make_run

AUTOENCODER = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(2,), decoder_width=8, decoder_depth=1, decoder_heads=2
)
ENCODER = EncoderSettings(width=16, depth=2, heads=2, patch_size=(2,))
NAMES = ("ant", "<b>bee</b>", "cat", "dog")


@pytest.fixture
def pretrained(tmp_path: Path, make_shards: Callable[..., Path]) -> RunFolder:
    shards = make_shards([20, 4])
    (shards / "classes.txt").write_text("\n".join(NAMES))
    folder = make_run(tmp_path / "run", [0.6] * 50)
    data = DataSettings((str(shards / "train-*.tar"),), image_size=(8,), channels=1)
    evaluation = OnlineEvaluationSettings((str(shards / "train-000000.tar"),))
    settings = PretrainSettings(folder.path, epochs=50.0, data=data, evaluation=evaluation, model=AUTOENCODER)
    (folder.path / "settings.yaml").write_text(dump(settings))
    torch.manual_seed(0)
    model = MaskedAutoencoder(AUTOENCODER, (8, 8), 1)
    described = describe_model("masked autoencoder", AUTOENCODER, (8, 8), (0.5,), (0.3,), 1.0)
    folder.publish(file_tensors(model), described.metadata())
    return folder


@pytest.fixture
def tuned(tmp_path: Path, make_shards: Callable[..., Path]) -> RunFolder:
    shards = make_shards([24])
    (shards / "classes.txt").write_text("\n".join(NAMES))
    folder = make_finetuning(tmp_path / "run", [0.3, 0.5])
    patterns = (str(shards / "train-*.tar"),)
    data = DataSettings(patterns, image_size=(8,), channels=1)
    settings = FinetuneSettings(folder.path, data=data, eval_shards=patterns, model=ENCODER)
    (folder.path / "settings.yaml").write_text(dump(settings))
    torch.manual_seed(0)
    model = build_classifier(ENCODER, (8, 8), 1, len(NAMES), "linear")
    torch.nn.init.normal_(model.head.weight)
    described = describe_model("classifier", ENCODER, (8, 8), (0.5,), (0.3,), 1.0, NAMES)
    folder.publish(file_tensors(model), described.metadata())
    return folder
