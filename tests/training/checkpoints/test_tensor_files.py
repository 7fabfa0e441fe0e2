"""The tensor files are plain safetensors; rows of many ranks are put together, or refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from mae.training.checkpoints.manifest import FileIdentity
from mae.training.checkpoints.tensor_files import (
    DamagedFileError,
    HostCopy,
    LocalRows,
    file_name,
    files_of,
    first_row,
    groups_of,
    local_rows,
    read_tensors,
    require_whole,
)

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def write(path: Path, tensors: dict[str, Tensor | LocalRows], **metadata: str) -> FileIdentity:
    copy = HostCopy()
    copy.take(tensors, metadata)
    return copy.write(path)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_shape_comes_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    numbers = torch.randint(0, 2, (math.prod(shape), torch.empty(0, dtype=dtype).element_size()), dtype=torch.uint8)
    tensor = numbers.view(-1).view(dtype).view(shape)
    beside = {"a": torch.ones(3, dtype=torch.int8), "z": torch.ones(3, dtype=torch.float64)}
    write(tmp_path / "model.safetensors", {"t": tensor, **beside})
    for found in (load_file(tmp_path / "model.safetensors"), read_tensors(tmp_path, ["model.safetensors"])):
        assert found.keys() == {"t", "a", "z"}
        assert bits(found["t"]) == bits(tensor)
        assert torch.equal(found["a"], beside["a"])
        assert torch.equal(found["z"], beside["z"])


def test_what_is_not_contiguous_or_asks_for_a_gradient_comes_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    write(tmp_path / "model.safetensors", {"w": weight, "t": weight.t(), "first": weight[:, 0]})
    found = read_tensors(tmp_path, ["model.safetensors"])
    assert torch.equal(found["w"], weight)
    assert torch.equal(found["t"], weight.t())
    assert torch.equal(found["first"], torch.tensor([0.0, 3.0]))


def test_a_file_is_what_safetensors_itself_writes(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, 3), "step": torch.tensor(5, dtype=torch.int64), "b": torch.ones(3, dtype=torch.int8)}
    identity = write(tmp_path / "ours", dict(tensors), format="pt")
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert identity == FileIdentity.of(tmp_path / "ours")


def test_a_file_without_tensors_is_one_too(tmp_path: Path) -> None:
    write(tmp_path / "ema.safetensors", {}, format="pt")
    assert read_tensors(tmp_path, ["ema.safetensors"]) == {}
    with safe_open(tmp_path / "ema.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_of_another_size_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae.training.checkpoints.tensor_files.CHUNK_BYTES", 7)
    identity = write(tmp_path / "model.safetensors", {"w": torch.arange(9.0)})
    assert identity == FileIdentity.of(tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.arange(9.0))


def test_the_host_memory_is_used_again_until_the_tensors_are_others(tmp_path: Path) -> None:
    copy = HostCopy()
    places = []
    for number, size in enumerate((3, 3, 4)):
        copy.take({"w": torch.full((size,), float(number))}, {})
        places.append(copy._block.data_ptr())
        copy.write(tmp_path / f"{number}")
        assert torch.equal(load_file(tmp_path / f"{number}")["w"], torch.full((size,), float(number)))
    assert places[0] == places[1]


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {})
    with pytest.raises(FileExistsError):
        write(tmp_path / "model.safetensors", {})


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t.is_floating_point and t != torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=lambda value: f"n03-{value}")
def test_what_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    copy = HostCopy()
    good = {"w": torch.tensor([0.0, 1.0, -2.0]).to(dtype), "e": torch.empty(0, dtype=dtype), "i": torch.tensor([1])}
    copy.take(dict(good), {})
    assert copy.first_not_finite() is None
    copy.take(good | {"bad": torch.tensor([1.0, value, 2.0]).to(dtype)}, {})
    assert copy.first_not_finite() == "bad"


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 9), writers=st.integers(2, 5))
def test_rows_of_all_ranks_are_put_together_c18(
    rows: int, writers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    tensor = torch.arange(rows * 6.0).view(rows, 2, 3)
    parts = [*tensor.chunk(writers), *[tensor[rows:]] * writers]
    for rank in range(writers):
        mine = {"w": LocalRows(parts[rank], first_row(rows, rank, writers), (rows, 2, 3))}
        everywhere = {"step": torch.tensor(5.0)} if rank == 0 else {}
        write(folder / file_name("model", rank, writers), mine | everywhere, format="pt")
    files = files_of("model", [path.name for path in folder.iterdir()])
    assert len(files) == writers
    found = read_tensors(folder, files)
    assert torch.equal(found["w"], tensor)
    assert torch.equal(found["step"], torch.tensor(5.0))


ROWS = torch.arange(8.0).view(4, 2)
FIRST, SECOND = LocalRows(ROWS[:2], 0, (4, 2)), LocalRows(ROWS[2:], 2, (4, 2))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FIRST, LocalRows(ROWS[3:], 3, (4, 2)), "rows 2 to 2 of w are missing"),
        (FIRST, LocalRows(ROWS[1:], 1, (4, 2)), "rows 1 to 1 of w are stored twice"),
        (FIRST, LocalRows(ROWS[2:3], 2, (4, 2)), "w has 3 rows in all, but should have 4"),
        (FIRST, None, "w has 2 rows in all, but should have 4"),
        (None, SECOND, "rows 0 to 1 of w are missing"),
        (FIRST, FIRST, "rows 0 to 1 of w are stored twice"),
        (FIRST, LocalRows(ROWS[2:], 2, (5, 2)), "belong to different tensors"),
        (FIRST, LocalRows(ROWS[2:].double(), 2, (4, 2)), "belong to different tensors"),
        (FIRST, LocalRows(ROWS[2:, :1], 2, (4, 2)), "belong to different tensors"),
        (FIRST, ROWS[2:], "belong to different tensors"),
        (LocalRows(ROWS[:2], 0, (4, 9)), LocalRows(ROWS[2:], 2, (4, 9)), "belong to different tensors"),
        (LocalRows(ROWS[:2], -2, (4, 2)), SECOND, "rows -2 to -1 of w are stored twice"),
        (ROWS, ROWS, "belong to different tensors"),
        (FIRST, LocalRows(ROWS[2:], 2, ()), "belong to different tensors"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(
    first: Tensor | LocalRows | None, second: Tensor | LocalRows | None, message: str, tmp_path: Path
) -> None:
    for rank, part in enumerate((first, second)):
        write(tmp_path / file_name("model", rank, 2), {} if part is None else {"w": part})
    files = [file_name("model", rank, 2) for rank in range(2)]
    for read in (read_tensors, require_whole):
        with pytest.raises(DamagedFileError, match=message):
            read(tmp_path, files)


@pytest.mark.parametrize(
    "names",
    [
        ["model-00000-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors"],
        ["model.safetensors", "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"],
        ["model-00000-of-00002.safetensors", "model-00001-of-00003.safetensors"],
        ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"],
    ],
)
def test_a_file_of_a_rank_that_is_missing_is_noticed(names: list[str]) -> None:
    assert groups_of(names) == ["model"]
    with pytest.raises(DamagedFileError, match="the files of model do not belong together"):
        files_of("model", names)


@pytest.mark.parametrize("name", ["optimizer.pt", "../model.safetensors", "model-1-of-2.safetensors", ".safetensors"])
def test_other_names_are_no_tensor_files(name: str) -> None:
    with pytest.raises(DamagedFileError, match="is not the name of a tensor file"):
        groups_of(["model.safetensors", name])


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shards(text: str) -> dict[str, str]:
    return {"shards": text}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(header(w=entry([1 << 40], 0, 1 << 42)) + bytes(8), id="x07-huge"),
        pytest.param(header(w=entry([1 << 62, 1 << 62], 0, 8)) + bytes(8), id="x07-size-overflows"),
        pytest.param(header(w=entry([2], 0, 8), v=entry([2], 4, 12)) + bytes(12), id="x07-overlapping"),
        pytest.param(header(w=entry([2], 0, 8), v=entry([2], 0, 8)) + bytes(8), id="x07-same-bytes-twice"),
        pytest.param(header(w=entry([2], 0, 8)) + bytes(16), id="x07-bytes-of-no-tensor"),
        pytest.param(header(w=entry([2], 8, 16)) + bytes(16), id="x07-gap"),
        pytest.param(header(w=entry([2], 8, 0)) + bytes(8), id="x07-backwards"),
        pytest.param(header(w=entry([-2], 0, 8)) + bytes(8), id="x07-negative"),
        pytest.param(header(w=entry([2], 0, 8, "PICKLE")) + bytes(8), id="x07-unknown-type"),
        pytest.param((1 << 62).to_bytes(8, "little") + b"{}", id="x07-huge-header"),
        pytest.param(header(__metadata__=shards("{"), w=entry([2], 0, 8)) + bytes(8), id="x07-shards-no-json"),
        pytest.param(header(__metadata__=shards("[]"), w=entry([2], 0, 8)) + bytes(8), id="x07-shards-a-list"),
        pytest.param(header(__metadata__=shards('{"w": {}}'), w=entry([2], 0, 8)) + bytes(8), id="x07-shards-empty"),
        pytest.param(
            header(__metadata__=shards('{"w": {"offset": 0, "shape": [1e300]}}'), w=entry([2], 0, 8)) + bytes(8),
            id="x07-shards-claim-a-huge-tensor",
        ),
        pytest.param(
            header(__metadata__=shards('{"w": {"offset": 0, "shape": [1e999]}}'), w=entry([2], 0, 8)) + bytes(8),
            id="x07-shards-claim-an-infinite-tensor",
        ),
        pytest.param(
            header(__metadata__=shards('{"w": {"offset": 0, "shape": [2]}}'), w=entry([], 0, 4)) + bytes(4),
            id="x07-rows-of-a-scalar",
        ),
        pytest.param(b"", id="x07-empty"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="x07-zip"),
    ],
)
def test_a_header_that_claims_too_much_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    for read in (read_tensors, require_whole):
        with pytest.raises(DamagedFileError, match=r"model\.safetensors is a damaged|w has 2 rows"):
            read(tmp_path, ["model.safetensors"])


def on_a_mesh(work: Callable[[], Any]) -> Callable[[], Any]:
    from mae.training.processes.accelerator import start_accelerator

    def run() -> Any:
        start_accelerator("fp32")
        return work()

    return run


def cut_in_every_way() -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    rank = mesh.get_local_rank()

    def distributed(rows: int, *placements: Any) -> DTensor:
        return distribute_tensor(torch.arange(rows * 2.0).view(rows, 2), mesh, placements)

    found: list[Any] = []
    for rows in (0, 1, 4, 5):
        part = local_rows("w", distributed(rows, Shard(0)), rank, writers=2)
        assert isinstance(part, LocalRows)
        found.append((part.offset, part.rows.tolist(), part.shape))
    found.append(local_rows("w", distributed(2, Replicate()), rank, writers=2).tolist())
    for tensor, writers in ((distributed(4, Shard(1)), 2), (distributed(4, Shard(0)), 1)):
        with pytest.raises(ValueError, match="w is distributed as"):
            local_rows("w", tensor, rank, writers)
    return found


def test_the_rows_that_a_rank_keeps_are_known_c18(on_two_ranks: Callable[[Callable[[], Any]], list[Any]]) -> None:
    first, second = on_two_ranks(on_a_mesh(cut_in_every_way))
    assert first == [
        (0, [], (0, 2)),
        (0, [[0.0, 1.0]], (1, 2)),
        (0, [[0.0, 1.0], [2.0, 3.0]], (4, 2)),
        (0, [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], (5, 2)),
        [[0.0, 1.0], [2.0, 3.0]],
    ]
    assert second == [
        (0, [], (0, 2)),
        (1, [], (1, 2)),
        (2, [[4.0, 5.0], [6.0, 7.0]], (4, 2)),
        (3, [[6.0, 7.0], [8.0, 9.0]], (5, 2)),
        [[0.0, 1.0], [2.0, 3.0]],
    ]
