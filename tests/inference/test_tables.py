"""`mae predict` and `mae embed`: one row per image, in order, whoever computes it and however often it was killed."""

import csv
import io
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import png, write_shards
from PIL import Image

import mae
from inference.conftest import NAMES, SIZE
from mae.data.eval_batches import EvalBatches
from mae.data.indexing import open_index
from mae.data.loader import normalize
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics
from mae.errors import BadDataError, UserError
from mae.inference import applying, parts
from mae.inference.model import BATCH
from mae.inference.sources import open_images
from mae.inference.table import Table
from mae.pipelines import embed, predict
from mae.pipelines.embed import EmbedSettings
from mae.pipelines.predict import PredictSettings
from mae.settings import parse

FORMATS = (".csv", ".jsonl", ".parquet")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 10 pictures in two folders, one of them damaged, beside two files that are none."""
    folder = tmp_path / "photos"
    for number in range(10):
        path = folder / ("b" if number % 2 else "a/deep") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG broken" if number == 4 else png(number, (9, 13), "RGB"))
    (folder / "Thumbs.db").write_text("x")
    (folder / ".hidden.png").write_text("x")
    return folder


def in_order(photos: Path) -> list[str]:
    return [f"{photos}/{name}" for name in
            [*(f"a/deep/{n}.png" for n in range(0, 10, 2)), *(f"b/{n}.png" for n in range(1, 10, 2))]]  # fmt: skip


def predicting(*words: str) -> PredictSettings:
    return parse(PredictSettings, [*words, "--workers", "0"], prog="mae predict")


def embedding(*words: str) -> EmbedSettings:
    return parse(EmbedSettings, [*words, "--workers", "0"], prog="mae embed")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of predictions, by key, error, names and probabilities."""
    if path.suffix == ".csv":
        found = list(csv.DictReader(io.StringIO(path.read_text())))
        return [
            {
                "key": row["key"],
                "error": row["error"] or None,
                "classes": [row[f"classes_{n}"] for n in (1, 2)] if not row["error"] else None,
                "probabilities": [float(row[f"probabilities_{n}"]) for n in (1, 2)] if not row["error"] else None,
            }
            for row in found
        ]
    lines = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else None
    lines = lines or [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: line[name] for name in ("key", "error", "classes", "probabilities")} for line in lines]


@pytest.mark.parametrize("suffix", FORMATS)
def test_predictions_of_a_folder(suffix: str, tuned: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    with pytest.raises(BadDataError, match=r"10 images, .*1 of them could not be used, .*a/deep/4\.png") as end:
        predict.run(predicting(str(tuned), str(photos), "--out", str(out), "--top", "2"))
    assert end.value.exit_code == 3
    rows = rows_of(out)
    assert [row["key"] for row in rows] == in_order(photos)
    model = mae.load(tuned, "cpu")
    for row in rows:
        if row["key"].endswith("4.png"):
            assert "not a valid image" in row["error"]
            assert row["classes"] is row["probabilities"] is None
        else:
            (expected,) = model.predict(row["key"], top=2)
            assert row["error"] is None
            assert tuple(row["classes"]) == expected.names
            assert row["probabilities"] == pytest.approx(expected.probabilities, rel=1e-5)
    assert not list(tmp_path.glob(".out*"))


def test_shards_are_predicted_as_evaluation_does(tuned: Path, tmp_path: Path) -> None:
    """The logits are those of evaluation, to the bit: the same batch of the same views."""
    write_shards(tmp_path / "shards", [40, 50], classes=3, size=(9, 13), mode="RGB")
    (tmp_path / "shards" / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    out = tmp_path / "out.parquet"
    predict.run(predicting(str(tuned), str(tmp_path / "shards"), "--out", str(out), "--top", "3"))
    table_ = pq.read_table(out).to_pylist()
    model, index = mae.load(tuned, "cpu"), open_index([str(tmp_path / "shards")], tmp_path / "cache")
    data = DataSettings(image_size=SIZE, channels=3, crop_pct=0.9)
    statistics = PixelStatistics(model.description.mean, model.description.std)
    with torch.no_grad():
        logits = torch.cat([model.network(normalize(batch.images, statistics))
                            for batch in EvalBatches(index, BATCH, data)])  # fmt: skip
    assert len(table_) == 90
    for number, (row, expected) in enumerate(zip(table_, logits.double().softmax(1), strict=True)):
        assert row["key"].endswith(f"train-00000{int(number >= 40)}.tar: {number:06d}.png")
        assert (row["label"], row["class"]) == (number % 3, NAMES[number % 3])
        assert row["probabilities"] == expected[row["labels"]].tolist()


def test_a_killed_run_continues_and_parts_of_another_run_are_not_used(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "shards", [2 * BATCH + 5], size=(9, 13), mode="RGB")
    words = [str(tuned), str(tmp_path / "shards"), "--out", str(tmp_path / "out.parquet")]
    whole = tmp_path / "whole.parquet"
    predict.run(predicting(*words[:3], str(whole)))

    computed: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Iterator[parts.Part]:
        for part in parts.compute_parts(*arguments, **named):
            computed.append(part.numbers.start)
            yield part
            if len(computed) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(applying, "compute_parts", counted)
    with pytest.raises(KeyboardInterrupt):
        predict.run(predicting(*words))
    assert computed == [0, BATCH]
    predict.run(predicting(*words))
    assert computed == [0, BATCH, 2 * BATCH]
    assert "2 of 3 parts are done already" in capsys.readouterr().out
    assert (tmp_path / "out.parquet").read_bytes() == whole.read_bytes()

    (tmp_path / "out.parquet").unlink()
    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        predict.run(predicting(*words))
    predict.run(predicting(*words, "--top", "1"))
    assert computed == [0, BATCH, 0, BATCH, 2 * BATCH]
    assert "other settings; they are removed" in capsys.readouterr().out


def test_ranks_share_the_parts(tuned: Path, tmp_path: Path) -> None:
    """What each of three processes writes, one after the other, is the table of one process."""
    write_shards(tmp_path / "shards", [3 * BATCH + 5], size=(9, 13), mode="RGB")
    model = mae.load(tuned, "cpu")
    images = open_images([str(tmp_path / "shards")], DataSettings(cache_dir=tmp_path / "cache"), print)
    ranges = parts.part_ranges(len(images))
    shares = []
    for rank in range(3):
        mine = ranges[rank::3]
        found = list(parts.compute_parts(images, mine, model.description, model.logits_of, 0))
        assert [part.numbers for part in found] == mine
        shares.append(found)
    one = list(parts.compute_parts(images, ranges, model.description, model.logits_of, 0))
    together = sorted((part for share in shares for part in share), key=lambda part: part.numbers.start)
    assert torch.equal(torch.cat([p.results for p in together]), torch.cat([p.results for p in one]))


@pytest.mark.parametrize(("tokens", "norm"), [("cls", "normed"), ("cls+avg", "raw")])
def test_features_as_parquet_and_npz(tokens: Any, norm: Any, tuned: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "a/deep/4.png").write_bytes(png(4, (9, 13), "RGB"))
    words = [str(tuned), str(photos), "--tokens", tokens, "--norm", norm, "--out"]
    embed.run(embedding(*words, str(tmp_path / "out.parquet")))
    embed.run(embedding(*words, str(tmp_path / "out.npz")))
    model, keys = mae.load(tuned, "cpu"), in_order(photos)
    expected = model.embed(keys, tokens, norm).numpy()
    found = pq.read_table(tmp_path / "out.parquet")
    assert b"huggingface" in found.schema.metadata
    assert found["key"].to_pylist() == keys
    np.testing.assert_allclose(np.array(found["embedding"].to_pylist(), np.float32), expected, rtol=1e-5, atol=1e-6)
    assert found["predicted"].to_pylist() == [each.names[0] for each in model.predict(keys, 1)]
    for key, image in zip(keys, found["image"].to_pylist(), strict=True):
        with Image.open(io.BytesIO(image["bytes"])) as thumbnail:
            assert np.array_equal(np.asarray(thumbnail), model.view(key).permute(1, 2, 0).numpy())
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["key"].tolist() == keys
        assert arrays["embedding"].dtype == np.float32
        assert np.array_equal(arrays["embedding"], np.array(found["embedding"].to_pylist(), np.float32))
        assert arrays["label"].tolist() == [-1] * 10
        assert "image" not in arrays


def test_an_encoder_without_a_head_and_a_bad_image(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is an encoder, .*mae embed.*mae finetune"):
        predict.run(predicting(str(pretrained), str(photos), "--out", str(tmp_path / "out.csv")))
    for out in ("out.parquet", "out.npz"):
        with pytest.raises(BadDataError, match="1 of them could not be used"):
            embed.run(embedding(str(pretrained), str(photos), "--thumbnails", "0", "--out", str(tmp_path / out)))
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert "predicted" not in found[0]
    assert "image" not in found[0]
    assert [row["embedding"] is None for row in found] == [key.endswith("4.png") for key in in_order(photos)]
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert np.isnan(arrays["embedding"]).all(1).tolist() == [key.endswith("4.png") for key in in_order(photos)]


def test_under_a_launcher_bad_images_are_said_and_the_exit_code_is_0(
    tuned: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(applying, "is_started_by_launcher", lambda: True)
    predict.run(predicting(str(tuned), str(photos), "--out", str(tmp_path / "out.csv")))
    said = capsys.readouterr().out
    assert "warning: " in said
    assert "1 of them could not be used" in said
    assert "best.safetensors, the best of its run: accuracy 50.00% after step 7" in said
    assert "left out: files that are no images: 1 (the first: " in said


def test_sources_are_taken_in_the_order_given(tuned: Path, photos: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [3], size=(9, 13), mode="RGB")
    sources = [f"{photos}/b/3.png", str(tmp_path / "shards"), f"{photos}/b/*.png", f"{photos}/a"]
    images = open_images(sources, DataSettings(cache_dir=tmp_path / "cache"), print)
    names = [images.name(number) for number in range(len(images))]
    assert names[0] == f"{photos}/b/3.png"
    assert [name[-10:] for name in names[1:4]] == [f"{n:06d}.png" for n in range(3)]
    assert names[4:] == [*(f"{photos}/b/{n}.png" for n in range(1, 10, 2)),
                         *(f"{photos}/a/deep/{n}.png" for n in range(0, 10, 2))]  # fmt: skip
    assert [images.label(number) for number in range(5)] == [None, 0, 1, 2, None]


def test_sources_whose_labels_mean_other_classes_are_refused(tmp_path: Path) -> None:
    for name, classes in (("a", "cat\ndog\n"), ("b", "car\nbus\n"), ("none", "")):
        write_shards(tmp_path / name, [4], classes=2, size=(9, 13), mode="RGB")
        (tmp_path / name / "classes.txt").write_text(classes)
    data = DataSettings(cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="different class lists, of 2 and 2 classes: label 0 is 'cat' in the first"):
        open_images([str(tmp_path / "a"), str(tmp_path / "b")], data, print)
    assert open_images([str(tmp_path / "none"), str(tmp_path / "a")], data, print).class_name(1) == "dog"


def test_what_lies_beside_shards_is_counted(photos: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [4], classes=2, size=(9, 13), mode="RGB").rename(photos / "shards")
    next((photos / "shards").glob("*.tar")).rename(photos / "train.tar")
    said: list[str] = []
    assert len(open_images([str(photos)], DataSettings(cache_dir=tmp_path / "cache"), said.append)) == 4
    assert said[-1].startswith("left out: images beside shards: 10 (the first: ")


def test_a_link_that_leads_nowhere_and_a_pipe_are_rows_that_say_so(tuned: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "link.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(photos / "pipe.png")
    (photos / "a" / "deep" / "4.png").unlink()
    with pytest.raises(BadDataError, match="2 of them could not be used"):
        predict.run(predicting(str(tuned), str(photos), "--out", str(tmp_path / "out.jsonl")))
    errors = {Path(row["key"]).name: row["error"] for row in rows_of(tmp_path / "out.jsonl") if row["error"]}
    assert errors.keys() == {"link.png", "pipe.png"}
    assert "No such file" in errors["link.png"]
    assert "not a regular file" in errors["pipe.png"]


def test_a_table_that_another_process_is_writing_is_left_to_it(tuned: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"

    def hold() -> None:
        with Table(out, pa.schema([]), {}).locked():
            held.set()
            time.sleep(60)

    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold)
    holder.start()
    assert held.wait(10)
    with pytest.raises(UserError, match=r"another process is writing .*out\.csv; wait for it"):
        predict.run(predicting(str(tuned), str(photos), "--out", str(out)))
    holder.kill()
    holder.join()
    with pytest.raises(BadDataError, match="10 images"):
        predict.run(predicting(str(tuned), str(photos), "--out", str(out)))


def test_names_that_are_not_utf8_are_written(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / 'a\udcff\n,".png').write_bytes(png(0, (9, 13), "RGB"))
    for suffix in FORMATS:
        predict.run(predicting(str(tuned), str(folder), "--out", str(tmp_path / f"out{suffix}"), "--top", "2"))
        (row,) = rows_of(tmp_path / f"out{suffix}")
        assert row["key"] == f'{folder}/a\\xff\n,".png'
    embed.run(embedding(str(tuned), str(folder), "--out", str(tmp_path / "out.npz")))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["key"].tolist() == [f'{folder}/a\\xff\n,".png']


def test_mistakes_are_one_line(tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("x")
    picture = tmp_path / "a.png"
    picture.write_bytes(png(0, (9, 13), "RGB"))
    for words, expected in (
        ([str(tuned)], "source is none given; allowed: image files, folders or shards"),
        ([str(tuned), str(tmp_path / "empty")], "empty holds no image of a known format"),
        ([str(tuned), str(tmp_path / "nothing.png")], "nothing.png does not exist"),
        ([str(tuned), str(tmp_path / "nothing.tar")], "nothing.tar"),
        ([str(tmp_path / "none"), str(picture)], "none does not exist"),
        ([str(tuned), str(picture), "--out", str(tmp_path / "there.csv")], "there.csv exists; remove it"),
        ([str(tuned), str(picture), "--out", "out.txt"], "out is out.txt; allowed: a name in .csv"),
        ([str(tuned), str(picture), "--top", "0"], "top is 0; allowed: 1 or more"),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            predict.main([*words, *([] if "--out" in words else ["--out", str(tmp_path / "new.csv")])])
        assert end.value.code == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
        assert expected in line
    assert (tmp_path / "there.csv").read_text() == "x"
