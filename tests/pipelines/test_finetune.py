"""Fine-tuning end to end: from a pretrained run and from scratch, with effective layer decay."""

import errno
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mae.errors import PreemptedError, UserError
from mae.evaluation import best
from mae.evaluation.classification import Accuracy
from mae.inference.model import load
from mae.models.readout import select
from mae.models.selection import read_selection
from mae.pipelines import finetune, pretrain
from mae.pipelines.export import ExportSettings
from mae.pipelines.export import run as export
from mae.pipelines.finetune import FinetuneSettings, run
from mae.settings import parse
from mae.training import loop, micro_batch
from mae.training.run_folder.folder import RunFolder
from pipelines.conftest import cut_at

MODEL = ["--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--model.patch_size", "2"]
DATA = ["--data.workers", "0", "--data.image_size", "8", "--data.channels", "1", "--data.crop_pct", "1"]
TINY = [
    *MODEL, *DATA, "--epochs", "3", "--batch_size", "8", "--log_every", "1", "--checkpoint_every", "4",
    "--optim.warmup_epochs", "1", "--optim.base_lr", "0.05", "--augment.rand_augment", "0",
]  # fmt: skip

MUON = ("--optim.name", "muon", "--optim.layer_decay", "0.5", "--ema_decay", "0.9", "--ema_warmup", "True")


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([13, 12])


@pytest.fixture
def held_out(make_shards: Callable[..., Path]) -> Path:
    return make_shards([7, 4], name="held-out")


@pytest.fixture
def pretrained(shards: Path, tmp_path: Path) -> Path:
    flags = [
        *MODEL,
        *DATA,
        "--epochs",
        "2",
        "--batch_size",
        "8",
        "--optim.warmup_epochs",
        "1",
        "--picture_images",
        "1",
    ]
    decoder = ["--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]
    places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(tmp_path / "pretrained")]
    return pretrain.run(parse(pretrain.PretrainSettings, [*flags, *decoder, *places], "mae pretrain")).path


def settings(shards: Path, held_out: Path, run_dir: Path, *flags: str) -> FinetuneSettings:
    places = ["--data.shards", str(shards / "*.tar"), "--eval_shards", str(held_out / "*.tar")]
    places += ["--eval_overlap", "1"]
    return parse(FinetuneSettings, [*TINY, *places, "--run_dir", str(run_dir), *flags], prog="mae finetune")


def test_one_class_is_refused(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    alike = make_shards([13], name="alike", classes=1)
    with pytest.raises(UserError, match=r"data\.shards have samples of one class only, the label 0"):
        run(settings(alike, alike, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_run_evaluates_every_epoch_on_every_sample(
    rendered: None, head: str, shards: Path, held_out: Path, pretrained: Path, tmp_path: Path
) -> None:
    folder = run(settings(shards, held_out, tmp_path / "run", "--init", str(pretrained), "--head", head))
    evaluations = [record for record in folder.metrics() if record["kind"] == "eval"]
    assert [record["samples"] for record in evaluations] == [11, 11, 11]
    assert [record["step"] for record in evaluations] == [4, 7, 10]
    assert "Accuracy" in folder.report.read_text()
    names = set(load_file(folder.model))
    assert ("head.fc1.weight" in names) == (head == "mlp")
    assert not [name for name in names if "decoder" in name or name == "mask_token"]


def test_it_starts_from_the_pretrained_encoder(shards: Path, held_out: Path, pretrained: Path, tmp_path: Path) -> None:
    """With no learning to speak of the encoder stays what pretraining made it."""
    flags = ["--optim.base_lr", "1e-30", "--optim.weight_decay", "0"]
    tuned = run(settings(shards, held_out, tmp_path / "run", "--init", str(pretrained), *flags))
    before, after = load_file(pretrained / "model.safetensors"), load_file(tuned.model)
    encoder = [name for name in after if not name.startswith("head.")]
    assert encoder
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-20) for name in encoder)
    scratch = run(settings(shards, held_out, tmp_path / "scratch", *flags))
    assert not torch.equal(load_file(scratch.model)["cls_token"], before["cls_token"])


def test_a_batch_size_found_by_trial_pairs_images_and_leaves_no_trace(
    shards: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixup and cutmix take pairs, so the least to be tried are two."""
    monkeypatch.setattr(micro_batch, "_LEAST_GAIN", -1e9)  # on a busy machine 8 images may seem to be slower than 4
    places = ["--data.shards", str(shards), "--eval_shards", str(held_out), "--run_dir", str(tmp_path / "auto")]
    places += ["--eval_overlap", "1"]
    finetune.main([*TINY, *places, "--epochs", "1", "--optim.warmup_epochs", "0", "--batch_size", "auto"])
    assert "micro_batch_size auto takes 8 images at a time" in capsys.readouterr().out
    plain = run(settings(shards, held_out, tmp_path / "plain", "--epochs", "1", "--optim.warmup_epochs", "0"))
    expected, found = load_file(plain.model), load_file(tmp_path / "auto" / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(UserError, match=r"takes 7 images of the global batch, which is not a multiple of 2"):
        run(settings(shards, held_out, tmp_path / "odd", "--batch_size", "7", "--micro_batch_size", "auto"))


def test_activation_checkpointing_draws_the_same_drop_path_and_changes_no_bit(
    shards: Path, held_out: Path, tmp_path: Path
) -> None:
    flags = ["--regularization.drop_path", "0.5", "--micro_batch_size", "4", "--activation_checkpointing"]
    plain, checkpointed = (run(settings(shards, held_out, tmp_path / on, *flags, on)) for on in ("none", "blocks"))
    losses = [[line["loss"] for line in folder.metrics()] for folder in (plain, checkpointed)]
    assert losses[0] == losses[1]
    expected, found = load_file(plain.model), load_file(checkpointed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_layer_decay_reaches_the_weights(
    shards: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AdamW moves a weight by about its learning rate a step, so decayed layers move less."""
    flags = ["--optim.layer_decay", "0.1", "--optim.weight_decay", "0", "--optim.warmup_epochs", "0"]
    one_step = ["--epochs", "0.3", "--regularization.drop_path", "0"]
    still = run(settings(shards, held_out, tmp_path / "a", *flags, *one_step, "--optim.base_lr", "1e-30"))
    moved = run(settings(shards, held_out, tmp_path / "b", *flags, *one_step, "--optim.base_lr", "0.32"))
    before, after = load_file(still.model), load_file(moved.model)

    def step_size(name: str) -> float:
        return float((after[name] - before[name]).abs().median())

    peak = 0.32 * 8 / 256
    assert step_size("head.fc2.weight") == pytest.approx(peak, rel=0.05)
    assert step_size("norm.bias") == pytest.approx(peak, rel=0.05)
    shown = capsys.readouterr().out
    for block in (1, 0):
        assert f"block {block}" in shown
    assert f"peak lr {peak * 0.1:.3e}" in shown
    assert f"peak lr {peak * 0.1**3:.3e}" in shown


@pytest.mark.parametrize("more", [(), MUON], ids=["adamw", "muon"])
def test_mixup_and_cutmix_resume_to_the_same_bits(
    more: tuple[str, ...], shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path, mixup, RandAugment and erasing draw from generators keyed by step and sample, so none is lost."""
    flags = ["--regularization.drop_path", "0.3", "--augment.rand_augment", "rand-m9-mstd0.5-inc1"]
    flags += ["--augment.erase", "0.25", *more]
    straight = run(settings(shards, held_out, tmp_path / "straight", *flags))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(8, patch)
        run(settings(shards, held_out, tmp_path / "cut", *flags))
    cut = run(settings(shards, held_out, tmp_path / "cut", *flags))
    expected, found = load_file(straight.model), load_file(cut.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    def trace(records: list[dict[str, float]]) -> list[tuple[float, float]]:
        return [(record["step"], record["loss"]) for record in records]

    assert trace(cut.metrics()) == trace(straight.metrics())
    if more:
        *_, last = (record for record in cut.metrics() if record["kind"] == "train")
        assert last["layer_lr"] == pytest.approx(
            {
                name: last["lr"] * 0.5**power
                for power, name in enumerate(["norm and head", "block 1", "block 0", "stem"])
            }
        )
        with pytest.raises(UserError, match=r"optim\.name"):
            run(settings(shards, held_out, tmp_path / "cut", *flags, "--optim.name", "adamw"))


def test_without_progress_a_run_ends_early_and_stays_finished(
    shards: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation is the best, since nothing is learned; with 3 of patience the fourth is the last."""
    flags = ["--optim.base_lr", "1e-30", "--epochs", "6", "--patience", "3", "--log_every", "9"]
    asked = settings(shards, held_out, tmp_path / "run", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(12, patch)
        run(asked)
    folder = run(asked)  # from step 8, after two of the four evaluations
    why = "ended early: patience 3, no accuracy above"
    assert "ended early at step 13 of 19: patience 3, no accuracy above" in capsys.readouterr().out
    records = folder.metrics()
    assert [record["step"] for record in records if record["kind"] == "eval"] == [4, 7, 10, 13]
    assert [record["step"] for record in records if record["kind"] == "train"] == [4, 8, 9, 12, 13]
    assert folder.last_exit() == "finished"
    assert f"13 steps, {why}" in (folder.path / "exit.json").read_text()
    assert folder.report.exists()
    published = folder.model.read_bytes()
    run(asked)
    again = capsys.readouterr().out
    assert "13 of 19 steps are done, and the run has ended early: patience 3" in again
    assert "written again" not in again
    assert folder.metrics() == records
    assert folder.model.read_bytes() == published

    # Another run that begins from its checkpoint goes on.
    on = ["--resume", str(folder.checkpoints / "step-000000013"), "--patience", "9"]
    longer = run(settings(shards, held_out, tmp_path / "on", *flags, *on))
    assert longer.last_exit() == "finished"
    assert (longer.checkpoints / "step-000000019").exists()


def test_a_run_that_is_stopped_at_the_step_of_its_early_end_ends_there(
    shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--optim.base_lr", "1e-30", "--epochs", "6", "--patience", "1"]
    asked = settings(shards, held_out, tmp_path / "run", *flags)
    step = loop.Loop.step

    def signalled(self: loop.Loop) -> None:
        step(self)
        if self.done == 5:  # told to all ranks with the next step, the seventh
            self.stop.number = signal.SIGTERM

    with monkeypatch.context() as patch, pytest.raises(PreemptedError):
        patch.setattr(loop.Loop, "step", signalled)
        run(asked)
    assert "saved at step" in (tmp_path / "run" / "exit.json").read_text()
    for _ in range(2):
        folder = run(asked)
        assert folder.last_exit() == "finished"
        assert [record["step"] for record in folder.metrics() if record["kind"] == "eval"] == [4, 7]
        assert folder.model.exists()
    assert "written again" not in capsys.readouterr().out


def test_accuracies_on_other_samples_are_not_compared(
    make_shards: Callable[..., Path], shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ["--optim.base_lr", "1e-30", "--epochs", "4"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(12, patch)
        patch.setattr(best, "evaluate", lambda *_: Accuracy(0.99, 0.1, 10))  # of samples that are easy
        run(settings(shards, held_out, tmp_path / "run", *flags))
    others = make_shards([6, 3], name="others")
    folder = run(settings(shards, others, tmp_path / "run", *flags))
    assert "eval_shards are others than before: the best model is chosen anew" in capsys.readouterr().out
    chosen = read_selection(folder.path / "best.safetensors")
    assert chosen is not None
    assert chosen.step > 8


def test_a_loss_that_is_not_finite_is_null_and_never_the_best(
    shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best, "evaluate", lambda *_: Accuracy(0.5, math.nan, 10))
    folder = run(settings(shards, held_out, tmp_path / "run", "--epochs", "6", "--patience", "2"))
    assert [record["loss"] for record in folder.metrics() if record["kind"] == "eval"] == [None, None]
    assert "patience 2, no finite loss" in (folder.path / "exit.json").read_text()
    assert not (folder.path / "best.safetensors").exists()


def test_a_full_disk_at_an_evaluation_does_not_end_the_run(
    shards: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish, calls = RunFolder.publish, list[str]()

    def full_at_first(self: RunFolder, weights: Any, metadata: Any, name: str = "model.safetensors") -> str:
        calls.append(name)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(self, weights, metadata, name)

    monkeypatch.setattr(RunFolder, "publish", full_at_first)
    flags = ["--optim.base_lr", "1e-30", "--epochs", "2", "--keep_checkpoints", "9", "--eval_every", "0.1"]
    folder = run(settings(shards, held_out, tmp_path / "run", *flags, "--checkpoint_every", "1"))
    assert "the best model of step 1 is not written: No space left on device; make room" in capsys.readouterr().err
    assert calls[-1] == "best.safetensors"  # at the end, from the checkpoint
    assert (folder.path / "best.safetensors").exists()


def test_patience_needs_something_to_wait_for(shards: Path, held_out: Path) -> None:
    with pytest.raises(UserError, match=r"patience is 0; allowed: 1 or more"):
        settings(shards, held_out, Path("run"), "--patience", "0")
    with pytest.raises(UserError, match=r"patience is 2; allowed: None without eval_shards"):
        parse(FinetuneSettings, [*TINY, "--run_dir", "run", "--patience", "2"], prog="mae finetune")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.depth", "1"], r"depth 2, settings ask for 1"),
        (["--model.heads", "4"], r"heads 2, settings ask for 4"),
        (["--batch_size", "7"], r"mixup and cutmix pair"),
        (["--labels_per_class", "50"], r"class 0 has 7 samples"),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: list[str], message: str, shards: Path, held_out: Path, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(settings(shards, held_out, tmp_path / "run", "--init", str(pretrained), *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pool", "freeze", "kept"),
    [
        ("avg", "encoder", ("cls_token", "pos_embed", "patch_embed.", "blocks.")),
        ("cls+avg", "blocks:1", ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")),
    ],
)
def test_frozen_weights_keep_their_bits_and_the_model_is_used_as_it_was_evaluated(
    shards: Path, held_out: Path, pretrained: Path, tmp_path: Path, pool: str, freeze: str, kept: tuple[str, ...]
) -> None:
    """The shape of the model is that of the pretrained one: no flag names it."""
    places = ["--data.shards", str(shards), "--eval_shards", str(held_out), "--init", str(pretrained)]
    words = [*places, *TINY[len(MODEL) + len(DATA) :], "--run_dir", str(tmp_path / "run"), "--eval_overlap", "1"]
    folder = run(parse(FinetuneSettings, [*words, "--data.workers", "0", "--pool", pool, "--freeze", freeze], "test"))
    before, after = load_file(pretrained / "model.safetensors"), load_file(folder.model)
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert same == {name for name in after if name.startswith(kept)}
    model = load(folder.path)
    assert model.description.pool == pool
    views = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    features, logits = model.features_and_logits_of(views)
    tokens: Any = pool
    torch.testing.assert_close(model.network.head(select(features, tokens, "normed")), logits)
    (exported,) = export(ExportSettings(folder.model, out=tmp_path / "timm"))
    assert exported.greatest_difference == 0


def test_an_unfinished_run_is_no_source(shards: Path, held_out: Path, pretrained: Path, tmp_path: Path) -> None:
    (pretrained / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not finished"):
        run(settings(shards, held_out, tmp_path / "run", "--init", str(pretrained)))
