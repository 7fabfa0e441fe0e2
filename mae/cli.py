"""`mae COMMAND ...`: import the module of the command, and run its `main`."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module

from mae import __version__
from mae.errors import INTERRUPTED_EXIT_CODE, USER_ERROR_EXIT_CODE
from mae.output import make_output_safe
from mae.progress import working

# Command: module whose main(argv) runs it, and what it does.
COMMANDS = {
    "init": ("mae.pipelines.init", "look at images and machine, and write settings to start with"),
    "pack": ("mae.pipelines.pack", "write images into WebDataset shards, with counts and statistics"),
    "index": ("mae.pipelines.index", "check shards strictly and store the place of every sample"),
    "doctor": ("mae.doctor.command", "check machine, data, batches and disk, and say whether to start"),
    "pretrain": ("mae.pipelines.pretrain", "pretrain a masked autoencoder on unlabelled shards"),
    "finetune": ("mae.pipelines.finetune", "fine-tune the encoder with a head"),
    "predict": ("mae.pipelines.predict", "predict the classes of images with a fine-tuned model"),
    "embed": ("mae.pipelines.embed", "write the features of images, with thumbnails"),
    "evaluate": ("mae.pipelines.evaluate", "judge encoders: k-NN, probes, fine-tuning, beside pixels"),
    "report": ("mae.report.command", "write one page about a run, or about several side by side"),
    "explore": ("mae.explore.command", "look at a run by hand in the browser: own pictures, masks, checkpoints"),
    "export": ("mae.pipelines.export", "write a model for other libraries, then load it back and compare"),
    "demo": ("mae.demo", "all of the above on scikit-learn's scanned digits, in minutes"),
}


def usage() -> str:
    """Return the text of `mae --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {does}" for name, (_, does) in COMMANDS.items())
    return (
        "usage: mae COMMAND [--config FILE] [--section.key value ...]\n\n"
        f"Masked-autoencoder pretraining, version {__version__}.\n\ncommands:\n{rows}\n\n"
        "`mae COMMAND --help` explains every setting. On several GPUs:\n"
        "`accelerate launch pipelines/pretrain.py --config FILE ...` runs the same `main` as `mae pretrain`.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one line and exit code 2."""
    make_output_safe()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if words[0] in ("-V", "--version"):
        print(f"mae {__version__}")
        return
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {words[0]!r}; known: {known}; see mae --help", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    name, _ = COMMANDS[words[0]]
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # Threads that wait for each other soon sleep, and leave the cores to data workers and other programs. OpenMP
        # reads this when torch is imported.
        os.environ["GOMP_SPINCOUNT"] = "1000"
    with nullcontext() if {"--quiet", "-h", "--help"} & set(words) else working("starting"):
        try:
            module = import_module(name)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED_EXIT_CODE)
    module.main(words[1:])


if __name__ == "__main__":
    main()
