"""Traces of small runs, exact to the last bit, to test that a refactoring does not change any result.

Record on the old commit, change the code, then compare. Only commands are used, so the same file works on both commits:

    python benchmarks/traces.py --out before.json
    python benchmarks/traces.py --out after.json --against before.json

A trace holds each logged loss, gradient norm and learning rate, the sample ids of each step and process, each
evaluation, and the sha256 of the final tensors (not of the files: safetensors orders its header at random). Each case
runs to its end; then a copy without the later checkpoints is resumed. The bits depend on the machine, the library
versions and the number of threads (here 1). So compare traces only on one machine; none are stored here.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CHECKPOINT_EVERY, RESUMED_FROM = 5, 10
# The positions are as in traces from before their temperature was a setting. An older commit does not know that flag:
# record there with its own copy of this file.
COMMON = [
    "--log_every", "1", "--checkpoint_every", str(CHECKPOINT_EVERY), "--keep_checkpoints", "100",
    "--record_samples", "True", "--batch_size", "64", "--optim.warmup_epochs", "0.2",
    "--model.width", "32", "--model.depth", "2", "--model.position_temperature", "10000",
]  # fmt: skip
PRETRAIN = [*COMMON, "--epochs", "1", "--picture_every", "7"]
FINETUNE = [*COMMON, "--epochs", "1", "--eval_every", "0.4", "--optim.base_lr", "0.05"]
KEPT_FIELDS = ("kind", "step", "epoch", "lr", "loss", "grad_norm", "skipped", "accuracy", "samples")


class Case(NamedTuple):
    """One run; `flags` follow the flags that all runs of its command share, and override them."""

    command: str
    flags: tuple[str, ...] = ()
    processes: int = 1


CASES = {
    "self": Case("pretrain"),
    "cross": Case("pretrain", ("--model.decoder", "cross", "--model.predict_ratio", "0.5")),
    "block mask, pixels, average": Case(
        "pretrain", ("--model.mask", "block", "--model.norm_pix_loss", "False", "--ema_decay", "0.9")
    ),
    "stream": Case("pretrain", ("--data.reader", "stream", "--data.stream_samples", "1000")),
    "views": Case("pretrain", ("--data.views_per_image", "2", "--data.workers", "2", "--data.keep_decoded", "False")),
    "accumulation": Case("pretrain", ("--micro_batch_size", "16", "--activation_checkpointing", "gelu")),
    "two processes": Case("pretrain", processes=2),
    "two processes, cross": Case("pretrain", ("--model.decoder", "cross"), processes=2),
    "from weights": Case("pretrain", ("--init", "{self}")),
    "finetune": Case(
        "finetune",
        (
            "--init", "{self}", "--regularization.mixup", "0.8", "--regularization.cutmix", "1",
            "--regularization.drop_path", "0.2", "--ema_decay", "0.9", "--optim.layer_decay", "0.75",
        ),
    ),
    "finetune, few labels": Case("finetune", ("--labels_per_class", "20", "--head", "linear", "--epochs", "6")),
    "finetune, two processes": Case("finetune", ("--init", "{self}", "--augment.rand_augment", "9"), processes=2),
}  # fmt: skip


def main() -> None:
    """Run all cases, write their traces, compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        traces = all_traces(Path(folder), arguments.jobs)
    arguments.out.write_text(json.dumps(traces, indent=1))
    print(f"{len(traces)} traces in {arguments.out}")
    if arguments.against is not None:
        compare(json.loads(arguments.against.read_text()), traces)


def all_traces(folder: Path, jobs: int) -> dict[str, Any]:
    """Return the traces of each case and its resumed copy; the case that others start from runs first."""
    shards = folder / "shards"
    launch(["-m", "mae", "pack", "digits", "--out", str(shards), "--workers", "0"])
    traces = traces_of("self", folder, shards)
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda name: traces_of(name, folder, shards), [name for name in CASES if name != "self"]):
            traces |= found
    return traces


def traces_of(name: str, folder: Path, shards: Path) -> dict[str, Any]:
    """Run a case, resume a copy of it from an earlier checkpoint, and return both traces."""
    case, run = CASES[name], folder / name.replace(" ", "-")
    start(case, run, folder, shards)
    traces = {name: trace(run)}
    resumed = run.with_name(f"{run.name}-resumed")
    shutil.copytree(run, resumed)
    for path in (resumed / "checkpoints").glob("step-*"):
        if int(path.name.partition("-")[2]) > RESUMED_FROM:
            shutil.rmtree(path)
    for path in [resumed / "model.safetensors", *resumed.glob("samples-rank*.jsonl")]:
        path.unlink()
    start(case, resumed, folder, shards)
    return traces | {f"{name}, resumed": trace(resumed)}


def start(case: Case, run: Path, folder: Path, shards: Path) -> None:
    flags = PRETRAIN if case.command == "pretrain" else FINETUNE
    places = ["--data.shards", str(shards / "train-*.tar"), "--run_dir", str(run)]
    if case.command == "finetune":
        places += ["--eval_shards", str(shards / "val-*.tar")]
    words = ["--config", str(CONFIGS / case.command / "digits.yaml"), *flags, *places]
    words += [flag.replace("{self}", str(folder / "self")) for flag in case.flags]
    if case.processes == 1:
        launch(["-m", "mae", case.command, *words])
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.processes)]
        launch([*torchrun, "-m", f"mae.pipelines.{case.command}", *words])


def launch(words: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def trace(run: Path) -> dict[str, Any]:
    """Return the trace of a finished run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "log": [
            {name: record[name] for name in KEPT_FIELDS if name in record}
            for record in records
            if record["kind"] in ("train", "eval")
        ],
        "samples": {path.name: path.read_text().splitlines() for path in sorted(run.glob("samples-rank*.jsonl"))},
        "tensors": {path.name: digest(path) for path in sorted(run.glob("*.safetensors"))},
    }


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print for each trace whether it is equal; exit with 1 if any differs."""
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name, old in before.items():
        parts = [part for part, value in old.items() if value != after.get(name, {}).get(part)]
        print(f"{name:<40} {'differs in ' + ', '.join(parts) if parts else 'equal'}")
    if different:
        sys.exit(f"{len(different)} traces differ: {', '.join(different)}")
    print(f"all {len(before)} traces are equal")


if __name__ == "__main__":
    main()
