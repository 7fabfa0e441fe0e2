"""`mae` itself: quick help, known commands, one line for a mistake."""

import os
import subprocess
import sys
from importlib import import_module

import pytest

from mae import __version__
from mae.cli import COMMANDS, main


def test_help_needs_neither_torch_nor_the_pipelines() -> None:
    code = (
        "import sys, mae.cli; mae.cli.main(['--help']); "
        "heavy = {'torch', 'timm', 'numpy', 'tyro', 'mae.pipelines'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_soon_sleep_unless_the_user_wants_otherwise(given: dict[str, str], seen: str) -> None:
    """OpenMP reads the variable when torch is imported, so that must come later."""
    code = (
        "import os, sys, mae.cli; from types import SimpleNamespace; "
        "look = SimpleNamespace(main=lambda words: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)); "
        "mae.cli.import_module = lambda name: look; mae.cli.main(['pretrain'])"
    )
    without = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=without | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [seen, "False"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"mae {__version__}\n"


def test_an_interrupt_while_torch_is_imported_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mae.cli.import_module", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["pretrain"])
    assert end.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretran"])
    assert end.value.code == 2
    assert "'pretran'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: mae {command}" in capsys.readouterr().out
    assert callable(import_module(COMMANDS[command][0]).main)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pretrain", "--run_dir", "x", "--model.mask_ratio", "1.5"], ["model.mask_ratio is 1.5", "below 1"]),
        (["pretrain", "--run_dir", "x", "--data.image_size", "30"], ["model.patch_size", "30x30"]),
        (
            ["pretrain", "--run_dir", "x", "--data.shards", "nowhere-*.tar"],
            ["nowhere-*.tar", "matches no file"],
        ),
        (["pretrain", "--run_dir", "x", "--modle.size", "tiny"], ["--modle.size", "--model.size"]),
        (["finetune", "--run_dir", "x", "--init", "nowhere", "--data.shards", "{1"], ["{1"]),
        (["export", "nowhere"], ["nowhere"]),
        (["pack", "nowhere", "--out", "x"], ["nowhere"]),
        (["demo", "--seeds", "0"], ["seeds is 0"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # on a terminal, tyro colours its complaints
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("error: ")
    assert "\x1b" not in shown[0]
    assert "╭" not in shown[0]
    for word in words:
        assert word in shown[0]
