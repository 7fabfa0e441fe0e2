"""The example scripts run on made-up images, and their figures equal scikit-learn's."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score, roc_auc_score

from examples import anomaly, iou, segmentation
from mae.cli import main as mae_command

SMALL_MODEL = {
    **{"size": "tiny", "width": 16, "depth": 1, "heads": 2, "patch_size": 4},
    **{"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def pretrained(folder: Path, shard: Path, *more: str) -> tuple[Path, Path]:
    run, encoder = folder / "run", folder / "encoder"
    model = [word for name, value in SMALL_MODEL.items() for word in (f"--model.{name}", str(value))]
    words = ["--epochs", "1", "--optim.warmup_epochs", "0", "--batch_size", "4", "--data.workers", "0", *model, *more]
    mae_command(["pretrain", "--data.shards", str(shard), "--run_dir", str(run), *words])
    mae_command(["export", str(run), "--to", "timm", "--out", str(encoder)])
    return run, encoder


def test_segmentation_runs_and_writes_counts_of_all_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    masks = [np.repeat(np.repeat(random.integers(0, 4, (4, 4), np.uint8), 8, 0), 8, 1) for _ in range(8)]
    samples = [{"png": png(np.stack([mask * 60] * 3, 2)), "seg.png": png(mask)} for mask in masks]
    shard = write_tar(tmp_path / "shards" / "all.tar", samples)
    _, encoder = pretrained(
        tmp_path,
        write_tar(tmp_path / "shards" / "plain.tar", [{"png": s["png"]} for s in samples]),
        "--data.image_size",
        "32",
    )
    out = tmp_path / "out.json"
    words = (
        f"--train {shard} --val {shard} --test {shard} --encoder {encoder} --out {out} --size 32 32 --classes 3 "
        "--ignore 3 --epochs 1 --head_epochs 30 --rates 1e-3 --head_rates 1e-4 1e-2 1e-3 --seeds 5 6"
    ).split()
    segmentation.main(words)
    complete = json.loads(out.read_text())
    rows = complete["rows"]
    assert len(rows) == 5
    labelled = sum(int((mask != 3).sum()) for mask in masks)
    assert all(np.sum(trial["pixels"]) == labelled for trials in rows.values() for trial in trials)
    plan = [(trial["images"], trial["seed"], trial["rate"]) for trial in rows["frozen, pretrained"]]
    assert plan == [("val", 5, 1e-4), ("val", 5, 1e-2), ("val", 5, 1e-3), ("test", 5, 1e-2), ("test", 6, 1e-2)]
    assert rows["frozen, pretrained"][3]["miou"] > 0.5  # gray levels alone tell the classes apart

    stopped = {**complete, "rows": {**rows, "resnet18, from scratch": rows["resnet18, from scratch"][:2]}}
    stopped["rows"]["frozen, pretrained"][0]["miou"] = "kept"
    out.write_text(json.dumps(stopped))
    segmentation.main(words)
    assert json.loads(out.read_text()) == complete
    with pytest.raises(SystemExit) as end:
        segmentation.main([*words, "--epochs", "2"])
    assert end.value.code == 2
    assert "holds results of other arguments, code or versions" in capsys.readouterr().err
    assert json.loads(out.read_text()) == complete


def tars_of(folder: Path) -> dict[str, Path]:
    """A tar that the examples can use, and others by what is wrong with them."""
    gray = png(np.zeros((32, 32), np.uint8))
    good = {"png": gray, "seg.png": gray, "json": b'{"boxes": []}'}
    sets = {
        "good": [good, {**good, "json": b'{"boxes": [[0, 0, 9, 9, 1]]}'}],
        "wrong order": [{**good, "json": b'{"boxes": [[0, 0, 9, 9, 1]]}'}, good],
        "empty": [],
        "no image": [{"seg.png": gray, "json": b"{}"}],
        "no mask, no boxes": [{"png": gray, "json": b"{}"}],
        "no picture": [{**good, "png": b"none"}],
        "other class": [{**good, "seg.png": png(np.full((32, 32), 7, np.uint8))}],
    }
    tars = {name: write_tar(folder / "shards" / f"{name}.tar", samples) for name, samples in sets.items()}
    for name, data in {"text": b"no tar", "cut": tars["good"].read_bytes()[:700]}.items():
        tars[name] = folder / name
        tars[name].write_bytes(data)
    tars["missing"] = folder / "missing.tar"
    return tars


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, tars = tmp_path, tars_of(tmp_path)
    plain = write_tar(folder / "plain" / "a.tar", [{"png": png(np.full((32, 32), 9 * n, np.uint8))} for n in range(8)])
    run, encoder = pretrained(folder, plain, "--data.image_size", "32", "--data.channels", "1")
    good = {"train": tars["good"], "test": tars["good"], "encoder": encoder, "out": folder / "out.json"}
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_bytes((encoder / "config.json").read_bytes())
    (folder / "broken" / "model.safetensors").write_bytes(b"none")
    both = [
        ({"out": folder / "none" / "out.json"}, "cannot be written"),
        ({"encoder": folder / "none"}, "no export for timm; write one: mae export"),
        ({"encoder": run}, "no export for timm; write one: mae export"),
        ({"encoder": folder / "broken"}, "not an intact safetensors file"),
        *(({"test": tars[name]}, "cannot be read as a tar") for name in ("missing", "text", "cut")),
        ({"train": tars["missing"]}, "cannot be read as a tar"),
        ({"train": tars["empty"]}, "holds no samples; give a tar of KEY.jpg or KEY.png, and KEY."),
        *(({"test": tars[name]}, "cannot be used") for name in ("no image", "no mask, no boxes", "no picture")),
    ]
    defects = [
        ({"run": encoder}, "has no decoder"),
        ({"run": folder / "none"}, "does not exist"),
        ({"tile": 24}, "must divide --side 32"),
        ({"limit": 1}, "must hold pairs"),
        ({"test": tars["wrong order"]}, "must hold pairs"),
        ({"patch": 8}, "has patches of 4x4; give those"),
    ]
    segments = [
        ({"size": "30 32"}, "which patches of 4x4 do not divide"),
        ({"out": tars["text"]}, "holds no results (Expecting value"),
        *(({name: tars["other class"]}, "has class 7; allowed: below --classes 3") for name in ("val", "test")),
    ]
    usual = {
        anomaly: ({**good, "run": run, "side": 32, "tile": 32, "patch": 4}, both + defects),
        segmentation: ({**good, "val": tars["good"], "size": "32 32", "classes": 3, "ignore": 3}, both + segments),
    }
    for script, (arguments, cases) in usual.items():
        for changes, message in cases:
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                script.main([word for name, value in (arguments | changes).items() for word in words_of(name, value)])
            said = capsys.readouterr().err
            assert end.value.code == 2, said
            assert message in said
            assert len(said.splitlines()) == 1
    assert not (folder / "out.json").exists()


def test_boxes_are_marked_where_they_are_in_images_that_are_not_square(tmp_path: Path) -> None:
    tall = {"png": png(np.zeros((64, 32), np.uint8)), "json": b'{"boxes": [[16, 48, 32, 64, 1]]}'}
    _, marks = anomaly.read(write_tar(tmp_path / "shards" / "a.tar", [tall]), 32, 8, None)
    assert marks.reshape(4, 4).nonzero().tolist() == [[3, 2], [3, 3]]


def test_numbers_of_things_are_at_least_1(capsys: pytest.CaptureFixture[str]) -> None:
    for script, name in ((anomaly, "--bank"), (segmentation, "--masks")):
        with pytest.raises(SystemExit) as end:
            script.main([name, "0"])
        assert end.value.code == 2
        assert "0 is below 1" in capsys.readouterr().err


def words_of(name: str, value: object) -> list[str]:
    return [f"--{name}", *(str(value).split() if name == "size" else [str(value)])]


def test_a_script_that_is_started_ends_without_a_traceback(tmp_path: Path) -> None:
    words = [word for name in ("train", "val", "test", "encoder") for word in (f"--{name}", str(tmp_path / name))]
    script = [sys.executable, segmentation.__file__, *words, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_miou_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(1)
    true, predicted = random.integers(0, 6, 2000), random.integers(0, 5, 2000)
    counts = iou.confusion(torch.tensor(true), torch.tensor(predicted), classes=5, ignore=5)
    kept = true != 5
    expected = jaccard_score(true[kept], predicted[kept], average=None, labels=range(5))
    np.testing.assert_allclose(iou.intersection_over_union(counts).numpy(), expected)


def test_anomaly_runs_and_finds_a_plain_defect(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    boards = [np.repeat(random.integers(0, 2, (64, 8), np.uint8) * 255, 8, 1) for _ in range(4)]
    good = [{"png": png(board), "json": b'{"boxes": []}'} for board in boards]
    test = []
    for board in boards:
        bad = board.copy()
        bad[8:16, 16:32] = 128
        test += [
            {"png": png(board), "json": b'{"boxes": []}'},
            {"png": png(bad), "json": b'{"boxes": [[16, 8, 32, 16, 1]]}'},
        ]
    train, shard = write_tar(tmp_path / "shards" / "good.tar", good), write_tar(tmp_path / "shards" / "test.tar", test)
    run, encoder = pretrained(tmp_path, train, "--data.image_size", "32", "--data.channels", "1")
    out = tmp_path / "out.json"
    words = f"--train {train} --test {shard} --encoder {encoder} --run {run} --out {out} --side 64 --tile 32 --patch 4"
    anomaly.main([*words.split(), "--masks", "2", "--seeds", "0"])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 11
    assert rows["difference to the template"][0]["patch"] == pytest.approx(1)
    assert rows["raw pixels"][0]["patch"] == pytest.approx(1)


def test_tiles_come_back_in_their_places() -> None:
    images = torch.rand(2, 1, 12, 12)
    tiles = anomaly.cut(images, 4)[:, 0]
    torch.testing.assert_close(anomaly.joined(tiles, 2), images.flatten(1))


def test_nearest_is_one_minus_the_greatest_cosine() -> None:
    queries, bank = (torch.nn.functional.normalize(torch.randn(*shape), dim=-1) for shape in ((2, 5, 7), (9, 7)))
    torch.testing.assert_close(anomaly.nearest(queries, bank), 1 - (queries @ bank.T).amax(2))


def test_auroc_is_that_of_scikit_learn_on_each_image() -> None:
    scores, marks = torch.rand(6, 100), torch.zeros(6, 100, dtype=torch.bool)
    marks[::2, 10:20] = True
    found = anomaly.figures(scores, marks)
    assert found["image, max"] == roc_auc_score([1, 0] * 3, scores.numpy().max(1))
    assert found["patch"] == roc_auc_score(marks.numpy().ravel(), scores.numpy().ravel())
