"""Cost of reliability: checkpoints, the guard against values that are not finite, and requests to stop.

`python benchmarks/trust.py [--blocks N] [--processes N]`

Trains the model of `configs/pretrain/digits.yaml` on 32 images of 8x8 pixels per process, with one thread each. These
steps are shorter than in real training, so every share is greater here. All runs share one process (with `--processes`,
each one that torchrun starts) and take turns in random order, so that other load on the machine affects all of them.
Wall time counts if a core is free. CPU time, of all threads of the process, hardly depends on other load, and is
the only reliable figure on a busy machine.

*Checkpoints.* Two runs take turns in blocks of 100 steps. One saves a checkpoint in the middle of each block, which its
thread writes during the steps that follow. The excess of a block is the time of the 20 steps from there on, less 20
times the median step of the block, which was equally busy. The cost is the median excess of this run, less that of the
run without checkpoints. Training itself waits for the copy of the tensors, which is measured alone and subtracted too.
CPU time includes the work of the thread; a whole save is also measured alone.

*Guard, consensus, watchdog and signals.* The loop cannot switch them off. So *bare*, in this file, does what the loop
does, without them. The runs take turns after each step, and the result is the median difference at the same step.
*Bare again* is a second such run, which shows how much equal runs differ here. All of them compute the norm of the
gradient, which is logged in any case. Then each piece that *bare* omits is called alone and compared with what replaces
it there, on tensors of the model's size, with cold CPU caches, as a step leaves them. With several processes, the
maximum is read at once, so the whole exchange counts; in training it overlaps with the step.
"""

import argparse
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch.distributed.run import main as torchrun
from webdataset import TarWriter

from mae.data.batch import to_device
from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.plan import plan_batches
from mae.data.source import IndexedSource
from mae.settings import parse
from mae.tasks.pretraining import Pretraining, PretrainSettings
from mae.training.checkpoints.tensor_files import HostCopy
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.guard import nan_gradients_if_nonfinite, step_unless
from mae.training.job import Job
from mae.training.loop import Loop, seed_step
from mae.training.meter import Meter, Steps
from mae.training.optimizer import set_learning_rate
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.consensus import RankConsensus
from mae.training.processes.signals import StopRequest, stop_on_signal
from mae.training.processes.watchdog import StackWatchdog
from mae.training.progress import TrainingProgress
from mae.training.start import start_job

ROOT = Path(__file__).parents[1]
IMAGES, SIDE, BATCH = 1437, 8, 32
BLOCK, WARM_UP, BESIDE, LOG_EVERY, NEVER = 100, 50, 20, 25, 10**9
CALLS = 300
FAR_BYTES = 1 << 25
"""More bytes than the caches of a core hold."""
BARE = ("bare", "bare again")

Times = NDArray[np.float64]
"""[..., 2] seconds of wall time and of CPU time."""


class World(NamedTuple):
    """Values that all runs share."""

    folder: Path
    accelerator: Accelerator
    index: ShardIndex
    stop: StopRequest
    watchdog: StackWatchdog
    numbers: Iterator[int]
    """Numbers of the runs, for the names of their folders."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    if options.folder is not None:
        measure(options.folder, options.blocks)
        return
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name) / "shards")
        if options.processes == 1:
            measure(Path(name), options.blocks)
        else:
            torchrun([
                "--standalone", f"--nproc_per_node={options.processes}", __file__,
                f"--folder={name}", f"--blocks={options.blocks}",
            ])  # fmt: skip


def measure(folder: Path, blocks: int) -> None:
    accelerator = start_accelerator("fp32")
    index = open_index([str(folder / "shards" / "*.tar")], folder)
    with stop_on_signal() as stop:
        world = World(folder, accelerator, index, stop, StackWatchdog(600.0), count())
        table = Table(accelerator, blocks)
        checkpoints(world, blocks, table)
        step_by_step(world, blocks, table)
        world.watchdog.stop()


def checkpoints(world: World, blocks: int, table: "Table") -> None:
    """Compare blocks of steps with a checkpoint in each, and without."""
    jobs = {"with": start(world, checkpoint_every=BLOCK), "without": start(world, NEVER)}
    loops = {name: Loop(job, world.stop, world.watchdog).steps() for name, job in jobs.items()}
    for loop in loops.values():
        for _ in range(WARM_UP):
            next(loop)
    excess: dict[str, list[Times]] = {name: [] for name in jobs}
    usual: list[Times] = []
    for block in range(blocks):
        for name in shuffled(jobs, block):
            steps = np.stack([timed(partial(next, loops[name])) for _ in range(BLOCK)])
            left = timed(partial(wait, jobs[name]))
            usual.append(np.median(steps, axis=0))
            beside = steps[BLOCK - WARM_UP :][:BESIDE]
            excess[name].append(beside.sum(axis=0) + left - len(beside) * usual[-1])
    step = np.median(usual, axis=0)
    cost = (np.median(excess["with"], axis=0) - np.median(excess["without"], axis=0)) / BLOCK
    copy, save = (each / BLOCK for each in save_times(world, jobs["without"]))
    table.row("a step", step)
    table.row("a checkpoint every 100 steps", cost, step)
    table.row("  of that the copy", copy, step)
    table.row("  beyond the copy", cost - copy, step)
    table.row("  all its work, without overlap", save, step)
    finish(jobs.values())


def step_by_step(world: World, blocks: int, table: "Table") -> None:
    """Compare steps of the loop with steps of a bare one."""
    jobs = {name: start(world, NEVER) for name in ("loop", *BARE)}
    loops = {name: bare_steps(job) if name in BARE else Loop(job, world.stop, world.watchdog).steps()
             for name, job in jobs.items()}  # fmt: skip
    times: dict[str, list[Times]] = {name: [] for name in jobs}
    for step in range(WARM_UP + blocks * BLOCK):
        for name in shuffled(jobs, step):
            seconds = timed(partial(next, loops[name]))
            if step >= WARM_UP:
                times[name].append(seconds)
    bare = np.median(times["bare"], axis=0)
    table.row("a bare step", bare)
    for name, run in (("guard, consensus, watchdog and signals", "loop"), ("  two equal runs differ by", "bare again")):
        table.row(name, np.median(np.stack(times[run]) - np.stack(times["bare"]), axis=0), bare)
    pieces = pieces_alone(world, *(jobs[name] for name in BARE))
    for name, seconds in pieces.items():
        table.row(f"  {name}", seconds, bare)
    table.row("  these pieces together", np.sum(list(pieces.values()), axis=0), bare)
    finish(jobs.values())


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Shuffle, in the same order in all processes."""
    listed = list(names)
    return random.Random(seed).sample(listed, len(listed))  # noqa: S311 (no secret)


def timed(work: Callable[[], object]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def wait(job: Job) -> None:
    """Wait until no checkpoint is being written."""
    if job.writer is not None:
        job.writer.wait()


def finish(jobs: Iterable[Job]) -> None:
    for job in jobs:
        wait(job)
        job.folder.unlock()


def bare_steps(job: Job) -> Iterator[int]:
    """Take the steps of `mae.training.loop` without the pieces that are measured here."""
    meter = Meter(job.accelerator, job.folder, job.progress, job.settings.data.max_bad_samples)
    batches = job.micro_batches(0, job.total)
    with job.progress.running(0, job.total):
        for step in range(job.total):
            seed_step(job.settings.seed, step, job.accelerator.process_index)
            set_learning_rate(job.optimizer, job.schedule(step))
            batch = meter.next_batch(batches)
            with job.accelerator.autocast():
                loss = job.loss_of(job.model, to_device(batch, job.accelerator.device))
            job.accelerator.backward(loss / job.plan.accumulation)
            norm = job.accelerator.clip_grad_norm_(job.model.parameters(), job.settings.optim.clip_grad or math.inf)
            job.optimizer.step()
            job.optimizer.zero_grad()
            meter.add(torch.stack([loss.detach()]).mean(), norm, [batch.ids])
            done = step + 1
            if done % LOG_EVERY == 0:
                report(job, meter, done)
            job.progress.step(done)
            yield done


def report(job: Job, meter: Meter, done: int) -> None:
    """Log a line, as the loop does."""
    meter.read(done)
    timing = meter.timing(job.plan.global_batch, job.task.flops_per_image)
    epoch, lr = job.epoch_after(done), job.schedule(done - 1)
    record = {"kind": "train", "step": done, "epoch": epoch, "lr": lr, **meter.steps.means(), **timing}
    if job.accelerator.is_main_process:
        job.log(record)
    job.progress.report(record, 0.0)
    meter.restart(Steps())


def pieces_alone(world: World, job: Job, plain: Job) -> dict[str, Times]:
    """Return the time that each piece adds to a step."""
    for parameter in (*job.model.parameters(), *plain.model.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-6) if parameter.requires_grad else None
    loss, norm = torch.ones((), requires_grad=True), torch.ones(())
    consensus = RankConsensus(job.accelerator, 600.0)

    def agree() -> None:
        consensus.submit(0, 0)
        consensus.maximum()

    return {
        "NaN gradients if loss is not finite": added(
            lambda: nan_gradients_if_nonfinite(loss).backward(), loss.backward
        ),
        "a step that can be skipped": added(lambda: step_unless(job.optimizer, ~norm.isfinite()), plain.optimizer.step),
        "consensus on stops and failed writes": added(agree),
        "watchdog for a step that is stuck": added(world.watchdog.reset),
        "check for a signal": added(lambda: world.stop.reason is None),
    }


def save_times(world: World, job: Job) -> tuple[Times, Times]:
    """Return the time to copy all tensors into allocated memory, and of a whole save in this thread."""
    tensors = job.state.tensors()
    copies = {group: HostCopy() for group in tensors}

    def take() -> None:
        for group, members in tensors.items():
            copies[group].take(members, {})

    rank = job.accelerator.process_index
    writer = CheckpointWriter(world.folder / f"alone-{rank}", keep=2, background=False)
    steps = count()

    def save() -> None:
        writer.save(tensors, job.task.description.metadata(), replace(job.start, step=next(steps)))

    return added(take), added(save, calls=CALLS // 10)


def added(work: Callable[[], object], without: Callable[[], object] = lambda: None, calls: int = CALLS) -> Times:
    """Return the median time that `work` takes beyond `without`, of interleaved calls with cold caches."""
    far = np.zeros(FAR_BYTES, dtype=np.uint8)

    def cold(call: Callable[[], object]) -> Times:
        np.add(far, 1, out=far)
        return timed(call)

    difference: Times = np.median([cold(work) - cold(without) for _ in range(calls)], axis=0)
    return difference


def start(world: World, checkpoint_every: int) -> Job:
    """Start a new run, as `mae pretrain` does."""
    config = ["--config", str(ROOT / "configs" / "pretrain" / "digits.yaml")]
    run_dir = world.folder / f"run-{next(world.numbers)}"
    settings = parse(PretrainSettings, [*config, "--run_dir", str(run_dir)], prog="trust")
    data = replace(settings.data, mean=(0.5,), std=(0.25,))
    accelerator = world.accelerator
    batch_size = BATCH * accelerator.num_processes
    settings = replace(
        settings, data=data, batch_size=batch_size, checkpoint_every=checkpoint_every, log_every=LOG_EVERY
    )
    plan = plan_batches(settings.batch_size, accelerator.num_processes, None)
    task = Pretraining(settings, IndexedSource(world.index))
    return start_job(task, plan, accelerator, TrainingProgress("trust", enabled=False))


def write_shards(folder: Path) -> None:
    """Write images of noise, as many as the training set of the digits has."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE), dtype=np.uint8)
    with (folder / "train-000000.tar").open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, image in enumerate(pixels):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            tar.write({"__key__": f"{number:06d}", "png": buffer.getvalue()})


class Table:
    """Table, printed row by row on the first process."""

    def __init__(self, accelerator: Accelerator, blocks: int) -> None:
        self._speaks = accelerator.is_main_process
        processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
        self._print(f"torch {torch.__version__}, {processes} of one thread, {blocks} blocks of {BLOCK} steps")
        self._print(f"{'':<38}{'wall us':>10}{'share':>9}{'CPU us':>12}{'share':>9}")

    def row(self, name: str, seconds: Times, whole: Times | None = None) -> None:
        """Print times of a step, and their share of `whole`."""
        cells = [f"{1e6 * each:,.1f}" for each in seconds]
        shares = ["", ""] if whole is None else [f"{share:.2%}" for share in seconds / whole]
        self._print(f"{name:<38}{cells[0]:>10}{shares[0]:>9}{cells[1]:>12}{shares[1]:>9}")

    def _print(self, text: str) -> None:
        if self._speaks:
            print(text, flush=True)


if __name__ == "__main__":
    main()
