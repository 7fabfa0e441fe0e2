"""Accuracy equals a plain count over all samples."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import results_of
from torch import nn

from mae.data.eval_batches import EvalBatches
from mae.data.indexing import open_index
from mae.data.loader import normalize
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics
from mae.errors import UserError
from mae.evaluation.classification import Accuracy, evaluate
from mae.training.processes.accelerator import start_accelerator

STATISTICS = PixelStatistics((0.5,), (0.25,))
DATA = DataSettings(image_size=(8,), channels=1, crop_pct=1.0)


@pytest.mark.parametrize("batch_size", [1, 4, 25])
def test_accuracy_and_loss_are_those_of_a_plain_count(
    batch_size: int, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    index = open_index([str(make_shards([13, 12]))], tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    found = evaluate(start_accelerator("fp32"), model, EvalBatches(index, batch_size, DATA), STATISTICS, workers=0)
    whole = EvalBatches(index, 25, DATA)[0]
    logits = model.eval()(normalize(whole.images, STATISTICS))
    labels = torch.arange(25) % 4
    assert found.samples == 25
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_a_bad_image_ends_the_evaluation_by_name(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards = make_shards([5])
    tar = shards / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 20] = bytes(20)
    tar.write_bytes(data)
    batches = EvalBatches(open_index([str(shards)], tmp_path), 4, DATA)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(UserError, match=r"1 bad image in the evaluation shards: .*000000.png"):
        evaluate(start_accelerator("fp32"), model, batches, STATISTICS, workers=0)


RANKS = 4


def measure(shards: Path, cache: Path, batch_size: int) -> tuple[int, Accuracy]:
    """How many ranks there are, and the accuracy of one and the same model on all of them."""
    index = open_index([str(shards)], cache)
    accelerator = start_accelerator("fp32")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    batches = EvalBatches(index, batch_size, DATA, rank, ranks)
    return ranks, evaluate(accelerator, model, batches, STATISTICS, workers=0)


def on_rank(rank: int, port: int, work: Callable[[], object], results: "multiprocessing.Queue[object]") -> None:
    """Put what `work` returns, or the text of its error, into `results`."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    # The test's own process has been a world of one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        results.put(work())
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")
    PartialState().destroy_process_group()


@pytest.mark.parametrize(("lengths", "batch_size"), [([13, 12], 3), ([3], 8), ([8, 8], 4)])
def test_four_processes_count_every_sample_once_and_measure_the_same_as_one_r12(
    lengths: list[int], batch_size: int, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    # 25 samples are 3 batches on one rank and 2 on the others; of 3 samples one rank gets none at all.
    work = partial(measure, make_shards(lengths), tmp_path, batch_size)
    alone, expected = work()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=on_rank, args=(rank, port, work, results)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    found = results_of(ranks, results)
    assert found == [found[0]] * RANKS
    together, accuracy = found[0]
    assert (alone, together) == (1, RANKS)
    assert (accuracy.samples, accuracy.accuracy) == (sum(lengths), expected.accuracy)
    assert accuracy.loss == pytest.approx(expected.loss, rel=1e-6)
