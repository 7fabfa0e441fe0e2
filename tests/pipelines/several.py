"""Run several commands, one after the other, on the ranks of one launcher: most of a start is the time to import torch.

Called as `several.py COMMANDS.json`, a list of commands: a script of pipelines/, then its arguments. Each command but
the last runs in a process that a rank forks: its errors are in `COMMAND-RANK.txt` in the current folder, its exit code
in `COMMAND-RANK.code`. The last runs in the rank itself: the launcher sees its errors and how it ends.
"""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from mae.pipelines import finetune, pretrain  # noqa: F401 - here, so that no command has to import them


def run(command: list[str]) -> None:
    """Be `python SCRIPT ARGUMENTS`."""
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_apart(command: list[str], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    run(command)


def main() -> None:
    *others, last = json.loads(Path(sys.argv[1]).read_text())
    rank = os.environ["RANK"]
    for number, command in enumerate(others):
        errors = Path(f"{number}-{rank}.txt")
        process = multiprocessing.get_context("fork").Process(target=run_apart, args=(command, errors))
        process.start()
        process.join()
        errors.with_suffix(".code").write_text(f"{process.exitcode}")
        # As torchrun does at a restart: what these ranks left in the launcher's store is not looked at any more.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{number + 1}"
    run(last)


if __name__ == "__main__":
    main()
