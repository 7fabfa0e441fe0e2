"""Stage smoke: do the commands work on this device, and is a resumed run the same to the bit?

Everything runs on scikit-learn's scanned digits. Each check can run alone: what it needs of others is made if it is
missing.
"""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import runs
from .commands import mae, run_python, run_until
from .measurement import Measurement
from .place import ROOT, Place
from .results import FailedError, Figures, SkippedError, UnfinishedError
from .worker import Worker

# Relative differences of the loss that are allowed: between launchers, and between precisions.
_LAUNCHED, _PRECISION = 0.01, 0.1
_BATCH = 256


def measurements(place: Place, worker: Worker) -> Iterator[Measurement]:
    """Return the checks of this stage, the most important first."""
    checks = (
        ("pretrain", pretrain), ("kill and resume to the bit", kill_and_resume), ("bf16 agrees with fp32", precisions),
        ("fine-tune", finetune), ("evaluate", evaluate), ("export", export), ("DDP of one", ddp),
        ("FSDP2 of one", fsdp2), ("cross, EMA, clipping, GELU recomputed, micro-batch auto", options),
        ("compile", compiled),
    )  # fmt: skip
    return (Measurement(name, partial(check, place)) for name, check in checks)


def shards(place: Place, split: str) -> str:
    """Return the glob of the packed digits; pack them if they are missing."""
    folder = place.work / "digits"
    if not (folder / "_info.json").exists():
        mae(place, "pack", "digits", "--out", folder)
    return f"{folder}/{split}-*.tar"


def words(place: Place, run: Path, *more: object) -> list[object]:
    """Return the settings of a short pretraining."""
    epochs, every = (6, 5) if place.rehearse else (60, 40)
    return [
        "--config", ROOT / "configs" / "pretrain" / "digits.yaml", "--data.shards", shards(place, "train"),
        "--run_dir", run, "--epochs", epochs, "--optim.warmup_epochs", 2, "--batch_size", _BATCH, "--log_every", every,
        "--checkpoint_every", every, "--data.workers", 1 if place.rehearse else 2, *more,
    ]  # fmt: skip


def straight(place: Place) -> Path:
    """Return the folder of an uninterrupted run; make it if it is missing."""
    run = place.work / "smoke" / "straight"
    if not (run / "model.safetensors").exists():
        mae(place, "pretrain", *words(place, run))
    return run


def pretrain(place: Place) -> Figures:
    run = straight(place)
    losses = [record["loss"] for record in runs.records(run)]
    if not losses[-1] < losses[0]:
        raise FailedError(f"the loss did not fall: {losses[0]:.4g} at first, {losses[-1]:.4g} at the end")
    return {"first_loss": losses[0], "last_loss": losses[-1], **runs.speed(run)}


def kill_and_resume(place: Place) -> Figures:
    """Kill a run after its first checkpoint, resume it, and compare it with the uninterrupted one."""
    expected, run = straight(place), place.work / "smoke" / "killed"
    killed_at = 0
    if not (run / "model.safetensors").exists():
        ended = run_until(
            place, ["-m", "mae", "pretrain", *words(place, run)],
            lambda: bool(runs.checkpoints(run)) or place.seconds_left() < 0, signal.SIGKILL,
        )  # fmt: skip
        found = runs.checkpoints(run)
        if not found and ended.was_stopped:
            raise UnfinishedError("the time was up before the first checkpoint")
        if not found:
            raise FailedError(f"pretraining ended with exit code {ended.code}", ended.output)
        killed_at = int(found[-1].name.partition("-")[2])
        mae(place, "pretrain", *words(place, run))
    different = runs.different_tensors(expected / "model.safetensors", run / "model.safetensors")
    if different:
        raise FailedError(f"{len(different)} tensors differ after the resume; {_repeatable(place, expected)}")
    return {"killed_after_step": killed_at, "tensors_equal": len(runs.tensors_of(run / "model.safetensors"))}


def _repeatable(place: Place, expected: Path) -> str:
    """Say whether a second uninterrupted run is the same: if not, the resume is not to blame."""
    again = place.work / "smoke" / "again"
    mae(place, "pretrain", *words(place, again))
    different = runs.different_tensors(expected / "model.safetensors", again / "model.safetensors")
    if different:
        return f"so do {len(different)} of an uninterrupted second run: training is not repeatable on this device"
    return "an uninterrupted second run is equal, so the resume is to blame"


def precisions(place: Place) -> Figures:
    """Train in fp32; on a GPU, which trains in bf16 by itself, the loss must be close but not the same."""
    run, expected = place.work / "smoke" / "fp32", straight(place)
    mae(place, "pretrain", *words(place, run, "--precision", "fp32"))
    difference = runs.require_close("the loss in fp32", runs.last_loss(run), runs.last_loss(expected), _PRECISION)
    if difference == 0 and not place.rehearse:
        raise FailedError("the loss in fp32 is the same, so precision auto did not choose bf16 on this device")
    return {"relative_difference": difference, "images_per_second_in_fp32": _images_per_second(run)}


def _images_per_second(run: Path) -> float:
    return float(runs.speed(run)["images_per_second"])


def finetune(place: Place) -> Figures:
    run, epochs = place.work / "smoke" / "tuned", 3 if place.rehearse else 20
    mae(
        place, "finetune", "--config", ROOT / "configs" / "finetune" / "digits.yaml", "--init", straight(place),
        "--data.shards", shards(place, "train"), "--eval_shards", shards(place, "test"), "--run_dir", run,
        "--epochs", epochs, "--optim.warmup_epochs", 1, "--eval_every", epochs,
    )  # fmt: skip
    return {"accuracy": runs.records(run, "eval")[-1]["accuracy"]}


def evaluate(place: Place) -> Figures:
    out = place.work / "smoke" / "evaluation"
    mae(
        place, "evaluate", straight(place), "--data.shards", shards(place, "train"), "--eval_shards",
        shards(place, "test"), "--protocols", "knn", "linear", "few_shot", "--out", out,
    )  # fmt: skip
    return runs.accuracies(out)


def export(place: Place) -> Figures:
    out = place.work / "smoke" / "encoder"
    if not (out / "model.safetensors").exists():
        mae(place, "export", straight(place), "--to", "timm", "--out", out)
    return {"bytes": sum(path.stat().st_size for path in out.iterdir())}


def ddp(place: Place) -> Figures:
    return _launched(place, "ddp")


def fsdp2(place: Place) -> Figures:
    return _launched(place, "fsdp2")


def _launched(place: Place, preset: str) -> Figures:
    """Start a run of one process by Accelerate's launcher; its loss must be that of the run without it."""
    run = place.work / "smoke" / preset
    run_python(
        place, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / f"{preset}.yaml",
        "--num_processes", 1, "--main_process_port", 0, ROOT / "pipelines" / "pretrain.py", *words(place, run),
    )  # fmt: skip
    expected = runs.last_loss(straight(place))
    difference = runs.require_close("the loss", runs.last_loss(run), expected, _LAUNCHED)
    return {"relative_difference": difference, "images_per_second": _images_per_second(run)}


def options(place: Place) -> Figures:
    """Combine settings whose code differs between devices."""
    run = place.work / "smoke" / "options"
    more = (
        "--model.decoder", "cross", "--model.predict_ratio", 0.5, "--ema_decay", 0.9, "--optim.clip_grad", 1.0,
        "--activation_checkpointing", "gelu", "--micro_batch_size", "auto",
    )  # fmt: skip
    mae(place, "pretrain", *words(place, run, *more))
    return {"last_loss": runs.last_loss(run), "images_per_second": _images_per_second(run)}


def compiled(place: Place) -> Figures:
    if place.rehearse:
        raise SkippedError("compiling for a CPU takes minutes; the stage step rehearses it without a code generator")
    run = place.work / "smoke" / "compiled"
    mae(place, "pretrain", *words(place, run, "--compile", "True"))
    expected = runs.last_loss(straight(place))
    difference = runs.require_close("the loss", runs.last_loss(run), expected, _PRECISION)
    return {"relative_difference": difference, "images_per_second": _images_per_second(run)}
