"""`mae evaluate`: features once, figures that can be repeated, and one line for each mistake."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import png, write_shards
from safetensors.torch import load_file, save_file

import mae
from mae.data.indexing import open_index
from mae.errors import UserError
from mae.evaluation import features
from mae.evaluation.protocols import learning_rate, resnet
from mae.evaluation.settings import EvaluateSettings
from mae.inference import parts
from mae.inference.image_set import ShardImages
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.description import describe_model
from mae.models.selection import Selection
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.weights import encoder_part, file_tensors, write_weights
from mae.pipelines import evaluate
from mae.report.class_results import read_evaluation
from mae.settings import parse

SETTINGS = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=8, decoder_depth=1, decoder_heads=2
)
NAMES = ("ant", "bee", "cat", "dog")


def write_model(folder: Path, seed: int = 0, crop_pct: float = 1.0) -> Path:
    folder.mkdir()
    torch.manual_seed(seed)
    model = MaskedAutoencoder(SETTINGS, (8, 8), 1)
    description = describe_model("masked autoencoder", SETTINGS, (8, 8), (0.5,), (0.3,), crop_pct)
    write_weights(folder / "model.safetensors", file_tensors(model), description.metadata())
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model `run` and labelled shards `train` and `test` of four classes."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "run")
    write_shards(tmp_path / "train", [50, 30])
    # Other images than those of `train`.
    write_shards(tmp_path / "more", [80, 24])
    (tmp_path / "more" / "train-000001.tar").rename(tmp_path / "test.tar")
    return tmp_path


def settings(*words: str) -> EvaluateSettings:
    given = words if words and not words[0].startswith("-") else ("run", *words)
    return parse(
        EvaluateSettings,
        [*given, "--data.shards", "train", "--eval_shards", "test.tar", "--data.workers", "0"],
        prog="mae evaluate",
    )


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images of which something is computed."""
    counts: list[int] = []
    compute_parts = features.compute_parts

    def counted(images: ShardImages, ranges: list[range], *rest: Any) -> Iterator[parts.Part]:
        counts.append(sum(map(len, ranges)))
        return compute_parts(images, ranges, *rest)

    monkeypatch.setattr(features, "compute_parts", counted)
    return counts


def test_features_are_computed_once_and_results_can_be_read_back(
    places: Path, computed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    every = ["--protocols", "knn", "linear", "few_shot", "pixels", "untrained", "--seeds", "2", "--shots", "2"]
    rows = evaluate.run(settings(*every, "--splits", "3"), "mae evaluate ...")
    assert computed == [80, 24] * 4  # the run, pixels, and two untrained encoders
    found = results(places / "run" / "evaluation")
    assert found["command"] == "mae evaluate ..."
    assert (found["train"]["samples"], found["test"]["samples"]) == (80, 24)
    assert [(row["encoder"], row["protocol"]) for row in found["rows"]] == [
        *(("run", protocol) for protocol in ("knn", "linear", "few_shot")),
        *(("untrained 16x2/4", protocol) for protocol in ("knn", "linear", "few_shot")),
        *(("pixels 8x8", protocol) for protocol in ("knn", "linear", "few_shot", "svm")),
    ]
    assert found["rows"] == json.loads(json.dumps([row.to_json() for row in rows]))
    for row in found["rows"]:
        assert len(row["trials"]) == (6 if row["protocol"] == "few_shot" else 2)
        assert np.array(row["confusion"]).sum() == 24 * len(row["trials"])
        assert row["trials"][0]["chosen"]["feature"]
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("encoder "))
    assert [line.split()[0] for line in lines[head : head + 4]] == ["encoder", "run", "run", "run"]
    assert "few_shot" in lines[head + 3]
    table = (places / "run" / "evaluation" / "results.md").read_text()
    assert f"| {100 * rows[0].mean('top1'):.1f} ±" in table
    page = (places / "run" / "evaluation" / "results.html").read_text()
    assert "untrained 16x2/4" in page

    again = evaluate.run(settings(*every, "--splits", "3"))
    assert computed == [80, 24] * 4
    assert [row.to_json() for row in again] == [row.to_json() for row in rows]


def test_features_are_those_of_the_loaded_model(places: Path) -> None:
    evaluate.run(settings("--protocols", "knn"))
    model, index = mae.load("run", "cpu"), open_index(["test.tar"], places / "cache")
    images = ShardImages(index, settings().data.as_seen_by(model.description))
    (row,) = results(places / "run" / "evaluation")["rows"]
    assert row["about"]["sha256"] == model.sha256
    extraction = features.encoder_features(model)
    cache = settings().data.as_seen_by(model.description).cache
    values = torch.from_numpy(features.read(extraction, index, cache))
    everything = [images.read(number) for number in range(len(images))]
    for number, norm in enumerate(("raw", "normed")):
        torch.testing.assert_close(values[:, number], model.embed(everything, "cls+avg", norm), rtol=1e-5, atol=1e-6)


def test_other_models_images_or_preparations_have_other_features(places: Path, computed: list[int]) -> None:
    evaluate.run(settings("--protocols", "knn"))
    write_model(places / "other", seed=1)
    evaluate.run(settings("run", "other", "--protocols", "knn"))
    assert computed == [80, 24] * 2
    write_shards(places / "new", [81])
    (places / "train").rename(places / "old")
    (places / "new").rename(places / "train")
    evaluate.run(settings("--protocols", "knn", "--eval_overlap", "1"))
    assert computed == [80, 24, 80, 24, 81]
    model, index = mae.load("run", "cpu"), open_index(["test.tar"], places / "cache")
    extraction = features.encoder_features(model)
    folders = {extraction.folder(index, places)}
    for change in ({"image_size": (8, 4)}, {"crop_pct": 0.5}, {"channels": 3}):
        other = replace(extraction, description=replace(model.description, **change))
        folders.add(other.folder(index, places))
    folders.add(replace(extraction, identity={"logits_of": model.sha256}).folder(index, places))
    assert len(folders) == 5


def test_damaged_features_are_computed_again(places: Path, computed: list[int]) -> None:
    evaluate.run(settings("--protocols", "knn"))
    cache = settings().data.as_seen_by(mae.load("run", "cpu").description).cache
    first = sorted((cache / "features").glob("*/part-000000-*.npy"))
    assert len(first) == 2
    first[0].write_bytes(first[0].read_bytes()[:-1])
    first[1].write_bytes(first[1].read_bytes()[:-1] + b"\x7f")
    computed.clear()
    evaluate.run(settings("--protocols", "knn"))
    assert sorted(computed) == [24, 64]  # the train set has two parts, of 64 and 16 images


def test_features_whose_speed_is_lost_can_be_used(places: Path, computed: list[int]) -> None:
    words = settings("--protocols", "knn", "--tokens", "cls", "--norm", "raw")
    evaluate.run(words)
    model, index = mae.load("run", "cpu"), open_index(["test.tar"], places / "cache")
    cache = settings().data.as_seen_by(model.description).cache
    extraction = features.encoder_features(model)
    speed = features.speed(extraction, index, cache)
    assert speed is not None
    assert speed["images_per_second"] > 0
    about = extraction.folder(index, cache) / "about.json"
    for damage in (b"", b"[]", b"[" * 60_000, b'{"images_per_second": "many"}'):
        about.write_bytes(damage)
        assert features.speed(extraction, index, cache) is None
    about.unlink()
    computed.clear()
    evaluate.run(words)
    assert not computed
    assert results(places / "run" / "evaluation")["speed"] == {"run": None}
    assert "- images per second: run: not known" in (places / "run" / "evaluation" / "results.md").read_text()


def test_a_tuned_model_is_judged_with_its_head(places: Path) -> None:
    index = open_index(["test.tar"], places / "cache")
    (places / "tuned").mkdir()
    torch.manual_seed(0)
    model = build_classifier(SETTINGS, (8, 8), 1, 4, "mlp")
    torch.nn.init.normal_(model.head.fc2.weight)
    description = describe_model("classifier", SETTINGS, (8, 8), (0.5,), (0.3,), 1.0)
    selection = Selection(index.fingerprint, 7, 0.5)
    metadata = description.metadata() | selection.metadata()
    write_weights(places / "tuned" / "best.safetensors", file_tensors(model), metadata)
    evaluate.run(settings("tuned", "--protocols", "knn", "--seeds", "2"))
    knn, head = results(places / "tuned" / "evaluation")["rows"]
    assert (knn["protocol"], head["protocol"]) == ("knn", "head")
    assert list(results(places / "tuned" / "evaluation")["speed"]) == ["tuned", "tuned, head"]
    assert knn["remarks"] == head["remarks"] == ["selected on this set"]
    images = ShardImages(index, settings().data.as_seen_by(description))
    logits = mae.load("tuned", "cpu").logits([images.read(number) for number in range(24)])
    expected = (logits.argmax(1).numpy() == index.label).mean()
    assert head["top1"] == {"mean": pytest.approx(expected), "deviation": None}
    read = read_evaluation(places / "tuned", places / "tuned" / "best.safetensors")
    assert read.confusion is not None
    assert read.confusion.counts.tolist() == head["confusion"]
    # Of another set, nothing is remarked.
    turned = settings("tuned", "--protocols", "knn")
    evaluate.run(replace(turned, data=replace(turned.data, shards=("test.tar",)), eval_shards=("train",)))
    assert [row["remarks"] for row in results(places / "tuned" / "evaluation")["rows"]] == [[], []]


def test_tokens_and_norm_can_be_given(places: Path) -> None:
    evaluate.run(settings("--protocols", "knn", "--tokens", "avg", "--norm", "normed", "--out", "out"))
    (row,) = results(places / "out")["rows"]
    assert row["trials"][0]["chosen"]["feature"] == "avg normed"


def test_what_a_model_does_not_say_can_be_given(places: Path) -> None:
    run = write_model(places / "other", crop_pct=0.875)  # as is taken for a model that does not say it
    save_file(encoder_part(load_file(run / "model.safetensors")), places / "encoder.safetensors")
    given = ("--data.mean", "0.5", "--data.std", "0.3", "--protocols", "knn")
    with pytest.raises(UserError, match=r"set model.heads \(in mae evaluate: data.heads;"):
        evaluate.run(settings("encoder.safetensors", *given))
    rows = evaluate.run(settings("other", "encoder.safetensors", *given, "--data.heads", "2", "--out", "out"))
    assert [row.encoder for row in rows] == ["other", "encoder.safetensors"]
    assert rows[0].trials == rows[1].trials


def message(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The line of a command that fails with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        evaluate.main(words)
    assert end.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    return line


def test_mistakes_are_one_line(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sets = ["--data.shards", "train", "--eval_shards", "test.tar", "--data.workers", "0"]
    assert "source" in message(capfd, *sets)
    assert "data.shards is none given; allowed: labelled shards" in message(capfd, "run", "--eval_shards", "test.tar")
    assert "eval_shards is none given" in message(capfd, "run", "--data.shards", "train")
    assert "nothing does not exist" in message(capfd, "nothing", *sets)
    assert "a model is named twice" in message(capfd, "run", "run/model.safetensors", *sets)
    assert "are also training samples" in message(capfd, "run", *sets[:3], "train", *sets[4:])
    assert "few_shot needs 40 (shots)" in message(capfd, "run", *sets, "--protocols", "few_shot", "--shots", "40")
    write_shards(places / "three", [12], classes=3)
    assert "eval_shards have labels up to 3, data.shards only up to 2" in message(
        capfd, "run", "--data.shards", "three", "--eval_shards", "test.tar", "--eval_overlap", "1"
    )
    write_shards(places / "one", [12], classes=1)
    assert "one class only" in message(capfd, "run", "--data.shards", "one", "--eval_shards", "one")
    (places / "train" / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    (places / "classes.txt").write_text("ant\nbee\ncat\nelk\n")
    assert "label 3 is 'dog' in the first and 'elk' in the second" in message(capfd, "run", *sets)


def test_unlabelled_and_bad_images_are_named(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from webdataset import TarWriter

    with TarWriter(str(places / "plain.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "png": png(0)})
    words = ["run", "--data.workers", "0", "--eval_shards", "test.tar", "--data.shards"]
    assert "1 of 1 samples have no valid .cls label" in message(capfd, *words, "plain.tar")
    with TarWriter(str(places / "bad.tar"), encoder=False) as tar:
        for number in range(8):
            tar.write({"__key__": f"{number}", "png": png(number)[:50], "cls": f"{number % 4}".encode()})
    assert "8 bad images: " in message(capfd, *words, "bad.tar")


TRAINED = ["attentive", "linear_paper", "partial 0", "partial 1/2", "partial 1", "finetune", "scratch", "resnet"]


def test_protocols_that_train_are_rows_beside_the_others(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet, "RATES", (0.1,))  # to save seconds
    monkeypatch.setattr(learning_rate, "MOST_MORE", 0)  # likewise
    names = dict.fromkeys(name.split()[0] for name in TRAINED)
    few = ["--epochs", "2", "--batch_size", "32", "--augment.rand_augment", "none"]
    rows = evaluate.run(settings("--protocols", "knn", *names, *few), "mae evaluate ...")
    assert sorted(row.protocol for row in rows) == sorted(["knn", *TRAINED])
    found = {row["protocol"]: row for row in results(places / "run" / "evaluation")["rows"]}
    for protocol in TRAINED:
        (trial,) = found[protocol]["trials"]
        assert trial["fitted_on"] == 80
        assert trial["chosen"]["steps"] == 5
        assert (trial["chosen"]["epochs"], trial["chosen"]["batch_size"]) == (2.0, 32)
        assert trial["chosen"]["seconds"] > 0
        assert 0 <= trial["measures"]["top1"] <= 1
    assert found["finetune"]["encoder"] == "run"
    assert found["scratch"]["encoder"] == "untrained 16x2/4"
    assert "resnet18" in capsys.readouterr().out


def test_rows_that_are_finished_survive_an_error_of_the_next(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise UserError("it did not stay finite")

    monkeypatch.setattr(resnet, "RATES", (0.1,))
    monkeypatch.setattr(learning_rate, "MOST_MORE", 0)
    words = settings("--protocols", "knn", "attentive", "resnet", "--epochs", "2", "--batch_size", "32")
    with monkeypatch.context() as patch:
        patch.setattr(resnet, "_network", fail)
        with pytest.raises(UserError, match="it did not stay finite"):
            evaluate.run(words)
    left = results(places / "run" / "evaluation")
    assert ([row["protocol"] for row in left["rows"]], left["finished"]) == (["attentive"], False)
    for name in ("results.md", "results.html"):
        assert "This evaluation is unfinished" in (places / "run" / "evaluation" / name).read_text()
    evaluate.run(words)
    whole = results(places / "run" / "evaluation")
    assert ([row["protocol"] for row in whole["rows"]], whole["finished"]) == (["knn", "attentive", "resnet"], True)
    assert "unfinished" not in (places / "run" / "evaluation" / "results.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch_size", "128"), r"batch_size is 128, but data.shards have only 72 samples .* allowed: 1 to 72"),
        (("--batch_size", "9"), r"mixup and cutmix pair the images of a batch, but a process takes 9 at a time"),
        (("--epochs", "0"), r"epochs is 0.0; allowed: above 0"),
        (("--epochs", "1"), r"72 samples for 1 epochs in batches of 64 are only 2 steps; allowed: 5 or more"),
        (("--augment.rand_augment", "strong"), r"augment.rand_augment is strong; allowed: none"),
        (("--protocols", "finetuned"), r"protocols"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(places: Path, words: tuple[str, ...], message: str) -> None:
    size = () if "--batch_size" in words else ("--batch_size", "64")
    given = words if words[0] == "--protocols" else ("--protocols", "finetune", *size, *words)
    with pytest.raises(UserError, match=message):
        evaluate.run(settings(*given))


def test_a_class_without_samples_cannot_be_trained(places: Path) -> None:
    for folder in (places / "train", places):
        (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\nemu\n")
    with pytest.raises(
        UserError, match=r"1 of 5 classes have no sample in data.shards, .*: emu; add samples, or leave"
    ):
        evaluate.run(settings("--protocols", "scratch", "--batch_size", "36"))


@pytest.mark.parametrize("protocol", ["knn", "linear", "few_shot", "pixels", "scratch"])
def test_without_a_sample_to_hold_out_nothing_is_chosen(places: Path, protocol: str) -> None:
    write_shards(places / "four", [4])
    few = settings("--protocols", protocol, "--batch_size", "4", "--eval_overlap", "1")
    with pytest.raises(UserError, match=r"data\.shards have one sample of each class, so none can be held out"):
        evaluate.run(replace(few, data=replace(few.data, shards=("four",))))


def test_two_samples_of_each_class_are_enough_for_one_shot(places: Path) -> None:
    write_shards(places / "eight", [8])
    words = ("--shots", "1", "--splits", "1", "--tokens", "cls", "--norm", "raw", "--eval_overlap", "1")
    few = settings("--protocols", "few_shot", "pixels", "untrained", *words)
    rows = evaluate.run(replace(few, data=replace(few.data, shards=("eight",))))
    assert [row.protocol for row in rows] == ["few_shot", "few_shot", "few_shot", "svm"]
    for row in rows:
        assert 0 <= row.trials[0].chosen["held_out_top1"] <= 1
