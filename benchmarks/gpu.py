"""What a GPU says about this project, in calls of a few minutes: does all work, how fast is it, what does it learn?

`python benchmarks/gpu.py --stage NAME|all --minutes 9 --out DIR [--wheels DIR] [--shards DIR] [--rehearse]`

Each call ends within its minutes and goes on where the one before stopped; DIR/results.json and DIR/results.md are
written after each measurement. `benchmarks/gpu.md` says what to bring, how to call it, and how to read what comes back.
"""

import argparse
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_stages import learn, loader, smoke, step
from gpu_stages.measurement import Measurement, run_stage
from gpu_stages.place import Place, deadline_after, make_importable
from gpu_stages.results import FailedError, Figures, Results, SkippedError, UnfinishedError
from gpu_stages.worker import Worker

STAGES: dict[str, Callable[[Place, Worker], Iterator[Measurement]]] = {
    "smoke": smoke.measurements,
    "step": step.measurements,
    "loader": loader.measurements,
    "learn": learn.measurements,
}


def parsed(words: list[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Return the options, and the settings after `--`, which are for `mae pretrain` in the stage learn."""
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this call, whatever it finishes")
    parser.add_argument("--out", type=Path, required=True, help="results; runs and caches are in its folder work")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of modules that this machine lacks")
    parser.add_argument("--shards", type=Path, help="folder with cifar10-*, tiny-imagenet-* and photos-* tars")
    parser.add_argument("--epochs", type=float, default=2000.0, help="epochs of the stage learn")
    parser.add_argument("--again", action="store_true", help="try again what failed or was skipped")
    parser.add_argument("--rehearse", action="store_true", help="everything at toy size on the CPU")
    options = parser.parse_args(own)
    for name in ("wheels", "shards"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name} {folder} is no folder; give one, or leave it out")
    return options, tuple(flags)


def main() -> None:
    """Run the stages as far as the time goes."""
    options, flags = parsed(sys.argv[1:])
    # So that the processes that were started end too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    deadline = deadline_after(options.minutes)
    shards = options.shards and options.shards.resolve()  # the commands run in another folder
    place = Place(options.out.resolve(), shards, options.rehearse, deadline, flags, options.epochs)
    results = Results(place.out / "results.json")
    if options.again:
        results.forget_failures()
    worker = Worker(place)
    try:
        make_importable(place.site, options.wheels)
        device = describe(results, place, worker)
        for stage in STAGES if options.stage == "all" else [options.stage]:
            worker.close()  # so that its memory is free, and no stage meets what another has left in the process
            run_stage(stage, STAGES[stage](place, worker), place, results, device)
    except (FailedError, UnfinishedError, SkippedError) as error:
        sys.exit(f"error: {error}")
    finally:
        worker.close()
    print(f"results: {place.out / 'results.md'}")


def describe(results: Results, place: Place, worker: Worker) -> str:
    """Note machine and versions, and return the name of the device.

    Raises:
        FailedError: if there is no GPU and this is no rehearsal, or the results are of another device.
    """
    about: Figures = worker.ask("machine.describe")
    about |= {"python": platform.python_version(), "cpus": place.cpus, "rehearsal": place.rehearse}
    if about["device"] == "cpu" and not place.rehearse:
        raise FailedError("torch finds no GPU here; --rehearse runs everything at toy size on the CPU")
    for name in ("device", "rehearsal") if results.about else ():
        if results.about[name] != about[name]:
            raise FailedError(
                f"{results.path} has {name} {results.about[name]}, but here it is {about[name]}; give another --out"
            )
    results.about = about
    results.write()
    return str(about["device"])


if __name__ == "__main__":
    main()
