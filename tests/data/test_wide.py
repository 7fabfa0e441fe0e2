"""A range for images of more than 8 bits: proposed, required before a start, stored with the model, kept on resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mae
from data.images.test_levels import npy, saved
from mae.data.images.augment import eval_view
from mae.data.images.decode import decode
from mae.data.images.levels import SIXTEEN_BITS
from mae.data.statistics import read_info
from mae.errors import UserError
from mae.export.timm import timm_config
from mae.models.description import read_description
from mae.pipelines import finetune, index, pack, pretrain
from mae.pipelines.index import IndexSettings
from mae.pipelines.pack import PackSettings
from mae.settings import parse
from mae.tasks.finetune_settings import FinetuneSettings
from pipelines import test_finetune, test_pretrain


def write(folder: Path, images: list[bytes], extension: str = "png") -> Path:
    from webdataset import TarWriter

    folder.mkdir()
    with TarWriter(str(folder / "train-000000.tar"), encoder=False) as tar:
        for number, image in enumerate(images):
            tar.write({"__key__": f"{number:03d}", extension: image, "cls": f"{number % 4}".encode()})
    return folder


def twelve_bits(count: int = 25) -> list[bytes]:
    images = np.random.default_rng(0).integers(0, 4096, (count, 8, 8)).astype(np.uint16)
    images[:, 0, :2] = 0, 4095
    return [saved(image, "PNG") for image in images]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write(tmp_path / "shards", twelve_bits())


def test_a_start_asks_for_the_range_and_the_run_carries_it(shards: Path, tmp_path: Path) -> None:
    left = r"values from 0 to 4095: of 256 levels of gray, 16 would be left"
    remedy = r"the first is .*000\.png; set --data.value_range 0 4096, or 0 65536 to keep"
    with pytest.raises(UserError, match=f"{left}; {remedy}") as refused:
        pretrain.run(test_pretrain.settings(shards, tmp_path / "run"))
    assert "\n" not in str(refused.value)
    range_set = ["--data.value_range", "0", "4096"]
    folder = pretrain.run(test_pretrain.settings(shards, tmp_path / "run", *range_set))
    description = read_description(folder.model)
    assert description.value_range == (0.0, 4096.0)
    assert description.mean[0] == pytest.approx(0.5, abs=0.02)  # of 4096 values, not of 65536
    assert timm_config(description)["value_range"] == [0.0, 4096.0]
    assert "value_range" not in timm_config(replace(description, value_range=None))
    # An array of raw values is seen as a file is.
    values = np.random.default_rng(0).integers(0, 4096, (8, 8)).astype(np.uint16)
    model = mae.load(folder.path, "cpu")
    expected = eval_view(decode(saved(values, "PNG"), 1, (0.0, 4096.0)), (8, 8), 0.875)
    for image in (saved(values, "PNG"), values, values.astype(np.float32)):
        assert torch.equal(model.view(image), expected)

    # Fine-tuning inherits the range, and a resumed run keeps it without the flag.
    places = ["--data.shards", str(shards), "--run_dir", str(tmp_path / "tuned"), "--init", str(folder.path)]
    flags = [*test_finetune.TINY, *places, "--model.depth", "1"]
    tuned = parse(FinetuneSettings, flags, prog="mae finetune")
    assert read_description(finetune.run(tuned).model).value_range == (0.0, 4096.0)
    (tmp_path / "tuned" / "model.safetensors").unlink()
    assert read_description(finetune.run(tuned).model).value_range == (0.0, 4096.0)


def test_the_whole_range_can_be_kept_and_changes_nothing(tmp_path: Path) -> None:
    full = write(tmp_path / "full", [saved(np.full((8, 8), 65535 - n, np.uint16), "PNG") for n in range(25)])
    losses = []
    for name, flags in (("unset", []), ("set", ["--data.value_range", "0", "65536"])):
        run = pretrain.run(
            test_pretrain.settings(
                full,
                tmp_path / name,
                *flags,
            )
        )
        losses.append(test_pretrain.losses(run.path))
    assert losses[0] == losses[1]


def test_a_run_of_before_the_setting_goes_on(shards: Path, tmp_path: Path) -> None:
    """It kept the upper eight bits, whatever was in them, and still does."""
    flags = ["--data.mean", "0.03", "--data.std", "0.02"]
    first = test_pretrain.settings(shards, tmp_path / "run", "--data.value_range", "0", "65536", *flags)
    expected = pretrain.run(first).model.read_bytes()
    saved_settings = tmp_path / "run" / "settings.yaml"
    values: dict[str, Any] = yaml.safe_load(saved_settings.read_text())
    del values["data"]["value_range"]
    saved_settings.write_text(yaml.safe_dump(values))
    (tmp_path / "run" / "model.safetensors").unlink()
    again = test_pretrain.settings(shards, tmp_path / "run", *flags)
    assert again.data.value_range == SIXTEEN_BITS
    assert pretrain.run(again).model.read_bytes() == expected


def test_arrays_and_other_wide_images_always_need_a_range(tmp_path: Path) -> None:
    arrays = [npy(np.random.default_rng(n).random((8, 8, 1), np.float32)) for n in range(25)]
    folder = write(tmp_path / "arrays", arrays, "npy")
    with pytest.raises(UserError, match=r"so their range must be set; the first is .*; set --data.value_range 0 1$"):
        pretrain.run(test_pretrain.settings(folder, tmp_path / "run"))
    flags = ["--data.value_range", "0", "1"]
    description = read_description(pretrain.run(test_pretrain.settings(folder, tmp_path / "run", *flags)).model)
    assert description.mean[0] == pytest.approx(0.5, abs=0.05)


def test_a_stream_asks_for_the_range_too(shards: Path, tmp_path: Path) -> None:
    stream = ["--data.reader", "stream", "--data.stream_samples", "25", "--data.mean", "0.5", "--data.std", "0.3"]
    with pytest.raises(UserError, match=r"set --data\.value_range 0 4096"):
        pretrain.run(test_pretrain.settings(shards, tmp_path / "run", *stream))


def test_index_and_pack_propose_a_range_and_store_no_mean(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = "25 images of more than 8 bits with values from 0 to 4095"
    found = index.run(IndexSettings(shards=(str(shards),), check=True, workers=0))
    assert found.pixels is None
    assert advice in capsys.readouterr().out
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(twelve_bits()):
        (images / f"{number}.png").write_bytes(image)
    pack.run(PackSettings(source=str(images), out=tmp_path / "out", workers=0))
    said = capsys.readouterr().out
    assert advice in said
    assert "train with --data.value_range 0 4096" in said
    assert "mean" not in read_info(tmp_path / "out")["splits"]["train"]


def test_the_doctor_names_the_range(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mae.doctor.command import main

    words = ["pretrain", *test_pretrain.TINY, "--data.shards", str(shards), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(words)
    assert "set --data.value_range 0 4096" in capsys.readouterr().out
    main([*words, "--data.value_range", "0", "2048"])
    assert "beyond data.value_range 0 2048: they become black or white; 0 4096 holds all" in capsys.readouterr().out
