"""Runs that begin with a model of another library, and commands that apply one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats.foreign import (
    MEAN,
    STD,
    published_file,
    timm_folder,
    timm_vit,
    torchvision_vit,
    transformers_folder,
    vit_classifier,
)
from safetensors.torch import load_file, save_file

from mae.errors import UserError
from mae.formats.opening import open_model
from mae.pipelines import embed, evaluate, finetune, predict, pretrain
from mae.settings import parse

QUICK = [
    "--data.workers", "0", "--epochs", "1", "--batch_size", "8", "--optim.warmup_epochs", "0",
    "--augment.rand_augment", "none", "--head", "linear",
]  # fmt: skip
NORMALIZATION = ["--data.mean", *map(str, MEAN), "--data.std", *map(str, STD)]


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([13, 12])


def published(folder: Path) -> Path:
    return published_file(folder / "mae_visualize_vit_large.pth", whole=True)


def timm_file(folder: Path) -> Path:
    save_file(timm_vit().state_dict(), folder / "vit.safetensors")
    return folder / "vit.safetensors"


def transformers(folder: Path) -> Path:
    return transformers_folder(folder / "vit", vit_classifier())


def torchvision(folder: Path) -> Path:
    torch.save(torchvision_vit().state_dict(), folder / "vit_b_16-c867db91.pth")
    return folder / "vit_b_16-c867db91.pth"


@pytest.mark.parametrize(
    ("make", "flags", "report"),
    [
        (published, NORMALIZATION, "(published MAE): 18 tensors loaded, 2 new (head.weight, head.bias), 20 left out"),
        (
            timm_file,
            [*NORMALIZATION, "--model.heads", "2"],
            "(timm): 30 tensors loaded, 2 new (head.weight, head.bias), 2 left out (head)",
        ),
        (transformers, [], "(transformers): 30 tensors loaded, 2 new (head.weight, head.bias), 2 left out (head)"),
        (
            torchvision,
            [*NORMALIZATION, "--model.heads", "2"],
            "(torchvision): 30 tensors loaded, 2 new (head.weight, head.bias), 2 left out (head)",
        ),
    ],
    ids=["published", "timm", "transformers", "torchvision"],
)
def test_fine_tuning_from_each_format(
    make: Callable[[Path], Path],
    flags: list[str],
    report: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = make(tmp_path)
    words = ["--init", str(init), "--data.shards", str(shards / "*.tar"), "--run_dir", str(tmp_path / "run")]
    finetune.run(parse(finetune.FinetuneSettings, [*QUICK, *flags, *words], "mae finetune"))
    assert f"initialised from {init} {report}" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "init.json").read_text())
    before, after = open_model(init, heads=2).weights, load_file(tmp_path / "run" / "model.safetensors")
    assert {*record["loaded"], *record["new"]} == after.keys()
    assert all(before[name].shape == after[name].shape for name in record["loaded"])
    if make == timm_file:
        init.unlink()  # a finished run needs it no longer
        finetune.run(parse(finetune.FinetuneSettings, [*QUICK, *flags, *words], "mae finetune"))


def test_pretraining_goes_on_from_another_library_with_other_patches_and_channels(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_folder(tmp_path / "vit", classes=0)
    words = [
        "--init",
        str(tmp_path / "vit"),
        "--data.shards",
        str(shards / "*.tar"),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    shape = [
        "--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--model.patch_size", "2",
        "--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2",
        "--data.image_size", "8", "--data.channels", "1", "--picture_images", "1", *QUICK[:8],
    ]  # fmt: skip
    pretrain.run(parse(pretrain.PretrainSettings, [*shape, *words], "mae pretrain"))
    said = capsys.readouterr().out
    assert "holds no decoder: its encoder gets a new one" in said
    assert (
        "(timm): 30 tensors loaded, 1 of them resampled (patch_embed.proj.weight 4x4 to 2x2 pixels, 3 to 1 channels), "
        "20 new (decoder_pos_embed, mask_token, decoder_embed.weight, decoder_embed.bias, "
    ) in said
    described = open_model(tmp_path / "run").description
    assert described.mean not in (MEAN, MEAN[:1])


def test_a_run_without_a_normalisation_is_refused(shards: Path, tmp_path: Path) -> None:
    words = ["--init", str(torchvision(tmp_path)), "--model.heads", "2", "--data.shards", str(shards / "*.tar")]
    with pytest.raises(UserError, match="does not say how its images were normalised; set "):
        finetune.run(parse(finetune.FinetuneSettings, [*QUICK, *words, "--run_dir", str(tmp_path / "run")], "mae"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_models_of_other_libraries_are_applied_and_judged(
    shards: Path, make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_folder(tmp_path / "vit", labels=list("abcde"))
    source = str(shards / "*.tar")
    common = ["--workers", "0"]
    predict.main([str(tmp_path / "vit"), source, *common, "--out", str(tmp_path / "predictions.csv")])
    assert "model.safetensors (timm): 32 tensors loaded" in capsys.readouterr().out
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1].split(",")[2] in "abcde"
    bare = published_file(tmp_path / "mae_pretrain_vit_base.pth")
    given = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    embed.main([str(bare), source, *common, *given, "--out", str(tmp_path / "features.npz")])
    held_out = make_shards([7, 4], name="held-out")
    evaluate.main(
        [
            str(bare), str(tmp_path / "vit"), "--data.shards", source, "--eval_shards", str(held_out / "*.tar"),
            "--data.workers", "0", *NORMALIZATION, "--protocols", "knn", "--eval_overlap", "1",
            "--out", str(tmp_path / "evaluation"),
        ]
    )  # fmt: skip
    assert "mae_pretrain_vit_base.pth (timm): 18 tensors loaded" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "evaluation" / "results.json").read_text())["rows"]) == 2
