"""Every shipped settings file goes through the parser, and what belongs together fits together."""

from pathlib import Path

import pytest

from mae.models.settings import MaskedAutoencoderSettings
from mae.pipelines.finetune import FinetuneSettings
from mae.pipelines.pretrain import PretrainSettings
from mae.settings import parse

CONFIGS = Path(__file__).parent.parent / "configs"
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))
FINETUNE = sorted((CONFIGS / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretrain_settings_are_valid(path: Path) -> None:
    settings = parse(PretrainSettings, ["--config", str(path)], prog="mae pretrain")
    assert isinstance(settings.model, MaskedAutoencoderSettings)
    assert settings.optim.warmup_epochs < settings.epochs


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_finetune_settings_fit_the_pretraining_of_the_same_name(path: Path) -> None:
    tuned = parse(FinetuneSettings, ["--config", str(path)], prog="mae finetune")
    trained = parse(PretrainSettings, ["--config", str(CONFIGS / "pretrain" / path.name)], prog="mae pretrain")
    assert tuned.model.shape == trained.model.shape
    assert tuned.model.patch == trained.model.patch
    assert tuned.data.size == trained.data.size
    assert tuned.data.channels == trained.data.channels


@pytest.mark.parametrize(("stage", "files"), [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_the_promised_settings_are_there(stage: str, files: list[Path]) -> None:
    names = {path.stem for path in files}
    assert {
        "digits",
        "fashion_mnist",
        "cifar10",
        "tiny_imagenet",
        "vit_base",
        "vit_large",
        "vit_huge",
    } <= names
