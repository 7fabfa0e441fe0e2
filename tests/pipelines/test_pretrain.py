"""Pretraining end to end: what a run leaves behind, exact resume, other process counts, bad input."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.pipelines import pretrain
from mae.pipelines.pretrain import run
from mae.settings import parse, to_dict
from mae.tasks.pretraining import PretrainSettings
from mae.training import micro_batch
from mae.yaml_files import load_yaml
from pipelines.conftest import cut_at
from pipelines.test_kills import kill_after, start

TINY = [
    "--epochs", "4", "--batch_size", "8", "--log_every", "1", "--checkpoint_every", "3", "--picture_every", "1000",
    "--picture_images", "2", "--data.workers", "0", "--data.image_size", "8", "--data.channels", "1",
    "--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "2",
    "--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2",
    "--optim.warmup_epochs", "1", "--optim.base_lr", "0.05",
]  # fmt: skip
STEPS = 13  # ceil(25 samples * 4 epochs / 8)


def settings(shards: Path, run_dir: Path, *flags: str) -> PretrainSettings:
    places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(run_dir)]
    return parse(PretrainSettings, [*TINY, *places, *flags], prog="mae pretrain")


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([13, 12])


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def assert_equal_tensors(model: Path, expected: dict[str, torch.Tensor]) -> None:
    """To the last bit; the files may differ in the order of their header."""
    found = load_file(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def consumed(run_dir: Path) -> dict[int, list[int]]:
    """Sample ids of every step over all ranks, sorted."""
    ids: dict[int, list[int]] = {}
    for path in run_dir.glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            ids.setdefault(record["step"], []).extend(record["ids"])
    return {step: sorted(of_step) for step, of_step in ids.items()}


def test_a_finished_run_holds_all_that_was_promised(rendered: None, shards: Path, tmp_path: Path) -> None:
    folder = run(settings(shards, tmp_path / "run"))
    for name in ("settings.yaml", "metrics.jsonl", "model.safetensors", "report.html"):
        assert (folder.path / name).stat().st_size > 0
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == ["step-000000012", "step-000000013"]
    assert [p.name for p in folder.pictures.iterdir()] == [f"step-{STEPS:09d}.png"]
    baselines, *records = folder.metrics()
    assert (baselines["kind"], baselines["step"], baselines["images"]) == ("baselines", 0, 25)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss"] < records[0]["loss"]
    names = set(load_file(folder.model))
    model = MaskedAutoencoder(settings(shards, tmp_path / "x").model, (8, 8), 1)
    assert names == {n.removeprefix("encoder.").removeprefix("decoder.") for n in model.state_dict()}


def test_the_report_shows_its_pictures_and_fetches_nothing(rendered: None, shards: Path, tmp_path: Path) -> None:
    text = run(settings(shards, tmp_path / "run")).report.read_text()
    assert text.count('src="data:image/') == text.count("<img") >= 1
    assert "://" not in text
    assert "mask_ratio" in text


def test_saved_settings_start_the_same_run(shards: Path, tmp_path: Path) -> None:
    folder = run(settings(shards, tmp_path / "run"))
    saved = parse(PretrainSettings, ["--config", str(folder.path / "settings.yaml")], prog="mae pretrain")
    assert to_dict(saved) == load_yaml(folder.path / "settings.yaml")
    assert saved.data.mean is not None
    again = parse(
        PretrainSettings,
        ["--config", str(folder.path / "settings.yaml"), "--run_dir", str(tmp_path / "again")],
        prog="mae pretrain",
    )
    assert losses(run(again).path) == losses(folder.path)


def test_a_run_says_what_it_begins_with(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(settings(shards, tmp_path / "run"))
    (shards / "val-000000.tar").write_bytes((shards / "train-000001.tar").read_bytes())
    capsys.readouterr()
    run(settings(shards, tmp_path / "two", "--init", str(first.path), "--data.skip_without_image", "True"))
    said = capsys.readouterr().out
    for line in (
        "device: CPU with 1 torch threads, precision fp32",
        "data: 37 images an epoch, as 8x8x1; shards by split: train 2, val 1",
        "data.shards holds 2 splits, and all of them are trained on; to leave some out, name the others",
        f"model: masked autoencoder, width 16, 1 blocks, 2 heads, 4,884 parameters, 4,476 of them trained, "
        f"initialised from {first.path}",
        "steps: 19 of 8 images, 4.108 epochs; the first line of losses estimates the time (ETA)",
    ):
        assert line in said


def test_a_finished_run_started_again_changes_nothing(shards: Path, tmp_path: Path) -> None:
    folder = run(settings(shards, tmp_path / "run"))
    before = folder.model.read_bytes(), (folder.path / "metrics.jsonl").read_bytes()
    run(settings(shards, tmp_path / "run"))
    assert (folder.model.read_bytes(), (folder.path / "metrics.jsonl").read_bytes()) == before


def test_a_new_folder_is_a_fresh_start_and_a_used_one_is_not_and_both_are_said_c08(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(shards, tmp_path / "run"))
    assert f"starting {tmp_path / 'run'} at step 0 of {STEPS}" in capsys.readouterr().out
    run(settings(shards, tmp_path / "run"))
    assert f"resuming {tmp_path / 'run'} from step-{STEPS:09d}" in capsys.readouterr().out


def test_a_run_can_begin_from_a_checkpoint_of_another_and_then_goes_on_from_its_own_c06(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same settings it ends with the same bits; with other ones it is what the branch is for."""
    flags = ["--keep_checkpoints", "9"]
    straight = run(settings(shards, tmp_path / "straight", *flags))
    middle = straight.checkpoints / "step-000000006"
    branch = [*flags, "--resume", str(middle)]
    assert_equal_tensors(run(settings(shards, tmp_path / "same", *branch)).model, load_file(straight.model))
    capsys.readouterr()
    slower = [*branch, "--optim.base_lr", "0.01"]
    run(settings(shards, tmp_path / "slower", *slower))
    assert f"other settings than those of {middle}: optim.base_lr was 0.05, is 0.01\n" in capsys.readouterr().out
    run(settings(shards, tmp_path / "slower", *slower))
    assert f"from step-{STEPS:09d}" in capsys.readouterr().out
    (middle / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"step-000000006 cannot be used: model\.safetensors"):
        run(settings(shards, tmp_path / "third", *branch))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model.heads", "1"), "model.heads is 2, settings ask for 1"),
        (("--model.decoder_heads", "1"), "decoder.heads is 2, settings ask for 1"),
    ],
)
def test_a_checkpoint_of_equal_shapes_but_other_heads_is_refused(
    shards: Path, tmp_path: Path, flags: tuple[str, str], named: str
) -> None:
    """The tensors would fit, but belong to other mathematics."""
    first = run(settings(shards, tmp_path / "first"))
    checkpoint = first.checkpoints / "step-000000012"
    with pytest.raises(UserError, match=rf"step-000000012 holds another model than the settings ask for: {named}; set"):
        run(settings(shards, tmp_path / "second", *flags, "--resume", str(checkpoint)))
    assert not (tmp_path / "second" / "settings.yaml").exists()


class UnpluggedError(Exception):
    """The plug is pulled."""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_cut_at_any_checkpoint_ends_with_the_same_bits(
    workers: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(settings(shards, tmp_path / "straight"))
    for step in (6, 12):
        with monkeypatch.context() as patch, pytest.raises(UnpluggedError):
            cut_at(step, patch, UnpluggedError)
            run(settings(shards, tmp_path / "cut", "--data.workers", workers))
    cut = run(settings(shards, tmp_path / "cut"))
    assert losses(cut.path) == losses(straight.path)
    assert_equal_tensors(cut.model, load_file(straight.model))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = run(settings(shards, tmp_path / "run"))
    expected = load_file(straight.model)
    newest = straight.checkpoints / "step-000000013" / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    capsys.readouterr()
    run(settings(shards, tmp_path / "run"))
    shown = capsys.readouterr().out
    assert "step-000000013 is not used: model.safetensors was changed or truncated" in shown
    assert "from step-000000012" in shown
    assert_equal_tensors(straight.model, expected)


def test_no_intact_checkpoint_is_no_reason_to_start_from_zero(shards: Path, tmp_path: Path) -> None:
    folder = run(settings(shards, tmp_path / "run"))
    for path in folder.checkpoints.iterdir():
        (path / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint .* is intact .*optimizer.safetensors is missing"):
        run(settings(shards, tmp_path / "run"))


def test_other_settings_are_refused_and_named(shards: Path, tmp_path: Path) -> None:
    run(settings(shards, tmp_path / "run"))
    with pytest.raises(UserError, match=r"model.mask_ratio was 0.75, is 0.5"):
        run(settings(shards, tmp_path / "run", "--model.mask_ratio", "0.5"))


def test_other_data_are_refused_unless_the_order_may_begin_anew_o13(
    shards: Path, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run(settings(shards, tmp_path / "run"))
    shutil.rmtree(folder.checkpoints / f"step-{STEPS:09d}")
    other = make_shards([12, 13], name="other")
    with pytest.raises(UserError, match=r"another data.*--restart_data_order"):
        run(settings(other, tmp_path / "run"))
    run(settings(other, tmp_path / "run", "--restart_data_order"))
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == ["step-000000012", "step-000000013"]


def test_moved_shards_are_the_same_data(shards: Path, tmp_path: Path) -> None:
    folder = run(settings(shards, tmp_path / "run"))
    shards.rename(tmp_path / "moved")
    run(settings(tmp_path / "moved", tmp_path / "run"))
    assert len(losses(folder.path)) == STEPS


def test_a_used_folder_that_is_no_run_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        run(settings(shards, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def damage_first_image(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 20] = bytes(20)
    tar.write_bytes(data)


def test_bad_images_stop_the_run_by_name_before_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    damage_first_image(shards / "train-000001.tar")
    with pytest.raises(UserError, match=r"1 bad image, 0 are allowed .*train-000001\.tar: 000013\.png") as caught:
        run(settings(shards, tmp_path / "run", "--data.mean", "0.5", "--data.std", "0.2", "--log_every", "100"))
    assert "\n" not in str(caught.value)
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert "step-000000013" not in saved


def test_accumulation_gives_the_same_losses(shards: Path, tmp_path: Path) -> None:
    whole = run(settings(shards, tmp_path / "whole", "--record_samples", "True"))
    parts = run(settings(shards, tmp_path / "parts", "--record_samples", "True", "--micro_batch_size", "2"))
    assert consumed(whole.path) == consumed(parts.path)
    assert losses(parts.path) == pytest.approx(losses(whole.path), rel=1e-5)


def test_a_batch_size_found_by_trial_is_said_and_kept_and_leaves_no_trace(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another outcome of a second trial would change the last bits of a run that goes on."""
    command = [*TINY, "--batch_size", "auto", "--data.shards", str(shards), "--run_dir", str(tmp_path / "auto")]
    monkeypatch.setattr(micro_batch, "_LEAST_GAIN", -1e9)  # on a busy machine 8 images may seem to be slower than 4
    with monkeypatch.context() as patch, pytest.raises(UnpluggedError):
        cut_at(6, patch, UnpluggedError)
        pretrain.main(command)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "micro_batch_size auto" in line]
    assert line.endswith("takes 8 images at a time: they are the whole share of a process; batch of 8 = 1 x 1 x 8")
    assert load_yaml(tmp_path / "auto" / "settings.yaml")["micro_batch_size"] == 8

    def surprising(*given: object, **more: object) -> micro_batch.MicroBatch:
        return micro_batch.MicroBatch(2, "the device has shrunk")

    monkeypatch.setattr(micro_batch, "find_micro_batch", surprising)
    pretrain.main(command)
    assert "micro_batch_size auto" not in capsys.readouterr().out
    plain = run(settings(shards, tmp_path / "plain"))
    assert losses(tmp_path / "auto") == losses(plain.path)
    assert_equal_tensors(tmp_path / "auto" / "model.safetensors", load_file(plain.model))
    pretrain.main([*command[:-1], str(tmp_path / "other")])
    assert "takes 2 images at a time: the device has shrunk; batch of 8 = 1 x 4 x 2" in capsys.readouterr().out
    small = run(settings(shards, tmp_path / "small", "--micro_batch_size", "2"))
    assert losses(tmp_path / "other") == losses(small.path)


def test_activation_checkpointing_may_be_turned_on_at_a_resume_and_changes_no_bit(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(settings(shards, tmp_path / "straight"))
    with monkeypatch.context() as patch, pytest.raises(UnpluggedError):
        cut_at(6, patch, UnpluggedError)
        run(settings(shards, tmp_path / "cut"))
    cut = run(settings(shards, tmp_path / "cut", "--activation_checkpointing", "blocks"))
    assert losses(cut.path) == losses(straight.path)
    assert_equal_tensors(cut.model, load_file(straight.model))


def test_every_sample_is_seen_once_an_epoch_o14(shards: Path, tmp_path: Path) -> None:
    folder = run(settings(shards, tmp_path / "run", "--record_samples", "True"))
    lines = (folder.path / "samples-rank0.jsonl").read_text().splitlines()
    stream = [i for line in lines for i in json.loads(line)["ids"]]
    for epoch in range(4):
        assert sorted(stream[25 * epoch : 25 * (epoch + 1)]) == list(range(25))


def test_rectangles_and_five_channels(tmp_path: Path) -> None:
    import io

    import numpy as np
    from webdataset import TarWriter

    (tmp_path / "shards").mkdir()
    with (tmp_path / "shards" / "train-0.tar").open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in range(16):
            buffer = io.BytesIO()
            np.save(buffer, np.random.default_rng(number).integers(0, 256, (12, 20, 5), dtype=np.uint8))
            tar.write({"__key__": f"{number}", "npy": buffer.getvalue()})
    flags = [
        "--data.image_size",
        "6",
        "12",
        "--model.patch_size",
        "2",
        "3",
        "--data.channels",
        "5",
        "--epochs",
        "2",
    ]
    folder = run(settings(tmp_path / "shards", tmp_path / "run", *flags))
    assert load_file(folder.model)["patch_embed.proj.weight"].shape == (16, 5, 2, 3)


def launch(command: list[str], folder: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, with one thread per process."""
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=whole, timeout=240, check=False)


ROOT = Path(__file__).parent.parent.parent
# With --standalone the launcher takes a free port; --local_addr spares it the name of this machine.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
TORCHRUN += ["--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_compiled_blocks_on_two_processes_give_the_same_losses(decoder: str, shards: Path, tmp_path: Path) -> None:
    decoder_flags = ["--model.decoder", decoder]
    one = run(settings(shards, tmp_path / "one", *decoder_flags))
    flags = [*decoder_flags, "--compile", "True", "--data.shards", str(shards / "*.tar"), "--run_dir"]
    script = str(ROOT / "pipelines" / "pretrain.py")
    done = launch([*TORCHRUN, script, *TINY, *flags, str(tmp_path / "two")], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one.path), rel=1e-5)


def test_a_launch_that_lost_its_processes_is_refused(shards: Path, tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    script = str(ROOT / "pipelines" / "pretrain.py")
    flags = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(tmp_path / "run")]
    done = launch([*accelerate, script, *TINY, *flags])
    assert done.returncode != 0
    assert "error: accelerate launch was asked for several CPU processes but started one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_killed_and_started_again_it_goes_on_o08(shards: Path, tmp_path: Path) -> None:
    """What goes on is a command of its own, to which nothing of the process that was killed is left but its files."""
    straight = run(settings(shards, tmp_path / "straight", "--epochs", "40"))
    flags = [*TINY, "--epochs", "40", "--run_dir", str(tmp_path / "run"), "--data.shards", str(shards / "*.tar")]
    kill_after(start(1, lambda: pretrain.main(flags)), tmp_path / "run", step=30, moment=0.0)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    done = launch([sys.executable, "-m", "mae", "pretrain", *flags])
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert losses(tmp_path / "run") == losses(straight.path)
    assert_equal_tensors(tmp_path / "run" / "model.safetensors", load_file(straight.model))


def test_a_warm_up_as_long_as_the_run_is_refused_before_anything_is_made_k07(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.warmup_epochs is 9\.0; allowed: less than epochs = 4; lower it"):
        run(settings(shards, tmp_path / "run", "--optim.warmup_epochs", "9"))
    assert not (tmp_path / "run").exists()
