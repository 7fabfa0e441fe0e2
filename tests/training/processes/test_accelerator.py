"""What the launcher promised is compared with what there is."""

import multiprocessing
import os
import socket
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import results_of

from mae.errors import UserError
from mae.training.processes.accelerator import start_accelerator


def test_one_process_on_the_cpu_runs_in_fp32() -> None:
    accelerator = start_accelerator("auto")
    assert accelerator.num_processes == 1
    if not torch.cuda.is_available():
        assert accelerator.mixed_precision == "no"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'; allowed: a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''; allowed: a number"),
        ({"MASTER_PORT": "a"}, "MASTER_PORT is 'a'; allowed: a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "2, but MASTER_ADDR, MASTER_PORT is not set"),
        ({"ACCELERATE_USE_CPU": "x"}, "Accelerate cannot start: .*ACCELERATE_USE_CPU"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "allowed: 1, because the setting micro_batch_size divides"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "allowed: no, because the setting compile compiles the model"),
        ({"ACCELERATE_TORCH_DEVICE": "xx"}, r"'xx', which cannot be used here \(Expected one of cpu"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "'meta', which cannot be used here"),
        ({"ACCELERATE_TORCH_DEVICE": "hpu"}, "'hpu', which cannot be used here"),
    ],
)  # fmt: skip
def test_variables_of_a_launcher_without_a_meaning_are_named(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as caught:
        start_accelerator("fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda")
    with pytest.raises(UserError, match="ACCELERATE_TORCH_DEVICE is 'cuda', which cannot be used here"):
        start_accelerator("fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_k09_bf16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="no GPU with bf16"):
        start_accelerator("bf16")


def test_fp16_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16"):
        start_accelerator("auto")


def test_k05_accelerate_started_one_process_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="asked for several CPU processes but started one"):
        start_accelerator("fp32")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_k05_processes_that_do_not_know_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    start = partial(start_accelerator, "fp32")
    with pytest.raises(UserError, match="asked for 2 processes but each runs alone"):
        start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("devices", "on_cpu", "is_refused"),
    [
        pytest.param("0", "false", True, id="k09-number"),
        pytest.param("GPU-8932f937", "false", True, id="k09-name"),
        pytest.param("0,1", "true", False, id="k09-cpu-asked-for"),
        pytest.param("", "false", False, id="k09-hidden"),
        pytest.param("-1", "false", False, id="k09-hidden-too"),
        pytest.param("NoDevFiles", "false", False, id="k09-none-by-slurm"),
    ],
)
def test_a_gpu_that_is_asked_for_and_absent(
    devices: str, on_cpu: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    monkeypatch.setenv("ACCELERATE_USE_CPU", on_cpu)
    refusal = pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES is {devices} but torch .* sees no GPU")
    with refusal if is_refused else nullcontext():
        start_accelerator("auto")


def test_r06_a_port_in_use_is_named() -> None:
    def meet() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            AcceleratorState._reset_state(reset_partial_state=True)
            try:
                start_accelerator("fp32")
            except UserError as error:
                messages.put((port, str(error)))

    context = multiprocessing.get_context("fork")
    messages = context.Queue()
    rank = context.Process(target=meet)
    rank.start()
    ((port, message),) = results_of([rank], messages)
    assert message.startswith(f"the processes cannot meet at 127.0.0.1:{port} (The server socket has failed to listen")
    assert "another port" in message
