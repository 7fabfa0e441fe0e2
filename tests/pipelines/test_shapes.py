"""Images of any shape, either decoder, and weights of an earlier run, from shards to timm."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from webdataset import TarWriter

from mae.errors import UserError
from mae.models.description import find_best_model
from mae.models.positions import resample_positions
from mae.pipelines import export, finetune, pretrain
from mae.settings import dump, parse, to_dict
from mae.training.run_folder.folder import RunFolder
from mae.yaml_files import load_yaml
from pipelines.conftest import cut_at

SAMPLES, CLASSES, STEPS = 16, 4, 4
COMMON = [
    "--epochs", "2", "--batch_size", "8", "--log_every", "1", "--data.workers", "0", "--data.crop_pct", "1",
    "--optim.warmup_epochs", "0", "--model.width", "16", "--model.depth", "2", "--model.heads", "2",
]  # fmt: skip
DECODER = ["--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]
RECTANGLE = ["--data.image_size", "32", "96", "--data.channels", "1", "--model.patch_size", "8", "16"]
PLANES = ["--data.image_size", "16", "--data.channels", "5", "--model.patch_size", "4"]
SQUARE = ["--data.image_size", "8", "--data.channels", "1", "--model.patch_size", "2"]
# So small that AdamW's step is lost in every weight: a run ends with what it began with.
STILL = ["--optim.base_lr", "1e-30", "--optim.weight_decay", "0"]


def rectangles(make_shards: Callable[..., Path], tmp_path: Path) -> Path:
    """Gray, 32 high and 96 wide."""
    return make_shards([SAMPLES], classes=CLASSES, size=(32, 96))


def planes(make_shards: Callable[..., Path], tmp_path: Path) -> Path:
    """Arrays of five planes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with (folder / "train-0.tar").open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in range(SAMPLES):
            array = io.BytesIO()
            np.save(array, np.random.default_rng(number).integers(0, 256, (18, 20, 5), dtype=np.uint8))
            tar.write({"__key__": f"{number:02}", "npy": array.getvalue(), "cls": str(number % CLASSES).encode()})
    return folder


@pytest.fixture
def squares(make_shards: Callable[..., Path]) -> Path:
    """Gray, 8 x 8."""
    return make_shards([SAMPLES], classes=CLASSES)


def pretrained(shards: Path, run_dir: Path, *flags: str) -> RunFolder:
    places = ["--data.shards", f"{shards}/*.tar", "--run_dir", str(run_dir), "--picture_images", "2"]
    return pretrain.run(parse(pretrain.PretrainSettings, [*COMMON, *DECODER, *places, *flags], prog="mae pretrain"))


def finetuned(shards: Path, run_dir: Path, *flags: str) -> RunFolder:
    places = ["--data.shards", f"{shards}/*.tar", "--eval_shards", f"{shards}/*.tar", "--run_dir", str(run_dir)]
    places += ["--eval_overlap", "1"]
    plain = ["--augment.rand_augment", "0"]
    return finetune.run(parse(finetune.FinetuneSettings, [*COMMON, *plain, *places, *flags], prog="mae finetune"))


def exported(folder: RunFolder) -> Path:
    (found,) = export.run(parse(export.ExportSettings, [str(folder.path)], prog="mae export"))
    return found.folder


@pytest.mark.parametrize(
    ("make", "shape", "decoder"),
    [
        pytest.param(rectangles, RECTANGLE, ["--model.mask", "grid"], id="rectangle-self"),
        pytest.param(planes, PLANES, ["--model.mask", "block"], id="five-channels-self"),
        pytest.param(
            rectangles, RECTANGLE, ["--model.decoder", "cross", "--model.predict_ratio", "0.5"], id="rectangle-cross"
        ),
    ],
)
def test_images_go_all_the_way_from_shards_to_timm(
    rendered: None,
    make: Callable[..., Path],
    shape: list[str],
    decoder: list[str],
    make_shards: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shards = make(make_shards, tmp_path)
    first = pretrained(shards, tmp_path / "pre", *shape, *decoder)
    (picture,) = first.pictures.iterdir()
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors()) > 16
    tuned = finetuned(shards, tmp_path / "tuned", *shape, "--init", str(first.path))
    assert [record["samples"] for record in tuned.metrics() if record["kind"] == "eval"] == [SAMPLES] * 2
    height, width = (32, 96) if shape is RECTANGLE else (16, 16)
    images = torch.randn(2, 1 if shape is RECTANGLE else 5, height, width)
    for folder in (first, tuned):
        encoder = timm.create_model(f"local-dir:{exported(folder)}", pretrained=True).eval()
        weights = load_file(find_best_model(folder.path))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
        assert encoder(images).shape == (2, 16)


def test_a_run_with_the_cross_decoder_that_is_cut_ends_with_the_same_bits(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that began with the weights of another, which is gone when it goes on with its own."""
    flags = [*SQUARE, "--model.decoder", "cross", "--model.predict_ratio", "0.5", "--checkpoint_every", "1"]
    init = pretrained(squares, tmp_path / "init", *flags, "--epochs", "1").path
    flags += ["--init", str(init)]
    straight = pretrained(squares, tmp_path / "straight", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(STEPS - 1, patch)
        pretrained(squares, tmp_path / "cut", *flags)
    shutil.rmtree(init)
    cut = pretrained(squares, tmp_path / "cut", *flags)
    expected, found = load_file(straight.model), load_file(cut.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_weights_go_from_run_to_run_at_sizes_of_their_own(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From autoencoder to autoencoder, to a classifier, to a classifier, to an autoencoder with a new decoder."""
    flags = [*SQUARE, "--epochs", "1"]
    last, grid = pretrained(squares, tmp_path / "first", *flags), (4, 4)
    mean = load_yaml(last.path / "settings.yaml")["data"]["mean"]
    turns = [(pretrained, (4, 6)), (finetuned, (3, 3)), (finetuned, (6, 6)), (pretrained, (4, 4))]
    for turn, (train, (rows, columns)) in enumerate(turns):
        size = ["--data.image_size", str(2 * rows), str(2 * columns)]
        this = train(squares, tmp_path / f"turn-{turn}", *flags, *size, *STILL, "--init", str(last.path))
        shown = " ".join(capsys.readouterr().out.split())
        assert f"data.image_size is {2 * rows}x{2 * columns}: its positions are resampled" in shown
        assert ("holds no decoder: its encoder gets a new one" in shown) == (turn == len(turns) - 1)
        before, after = load_file(last.model), load_file(this.model)
        parts = ("head", "decoder", "mask_token") if turn else ("head",)
        carried = [name for name in after if not name.startswith(parts)]
        assert carried
        for name in carried:
            is_table = name in ("pos_embed", "decoder_pos_embed")
            expected = resample_positions(before[name], grid, (rows, columns)) if is_table else before[name]
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-20, msg=name)
        assert load_yaml(this.path / "settings.yaml")["data"]["mean"] == mean
        last, grid = this, (rows, columns)


def test_another_decoder_is_refused_and_the_way_out_is_one(squares: Path, tmp_path: Path) -> None:
    first = pretrained(squares, tmp_path / "first", *SQUARE, "--epochs", "1")
    cross = [*SQUARE, "--epochs", "1", "--model.decoder", "cross", *STILL]
    with pytest.raises(UserError, match=r"has a decoder of kind self, settings ask for cross; .* mae export .*first"):
        pretrained(squares, tmp_path / "refused", *cross, "--init", str(first.path))
    assert not (tmp_path / "refused").exists()
    encoder = exported(first)
    second = pretrained(squares, tmp_path / "second", *cross, "--init", str(encoder))
    before, after = load_file(encoder / "model.safetensors"), load_file(second.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_name_of_timms_is_a_setting_like_any_other(tmp_path: Path) -> None:
    flags = ["--run_dir", "a", "--model.size", "vit_small_patch32_224", "--model.depth", "2"]
    settings = parse(pretrain.PretrainSettings, flags, prog="mae pretrain")
    assert (settings.model.patch, settings.model.shape) == ((32, 32), (384, 2, 6))
    (tmp_path / "settings.yaml").write_text(dump(settings))
    again = parse(pretrain.PretrainSettings, ["--config", str(tmp_path / "settings.yaml")], prog="mae pretrain")
    assert to_dict(again) == to_dict(settings)
