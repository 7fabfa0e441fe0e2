"""Safetensors files whose bytes depend only on their content; the library's own order of metadata is random."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 1 << 24
"""Most bytes that are written or hashed at once."""


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors in the order of the file: the widest elements first, which keeps each aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header: eight bytes of length, then JSON with sorted metadata, padded to a multiple of eight bytes."""
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in in_file_order(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        content[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file; only one tensor at a time is copied, if it is not contiguous or not on the CPU."""
    yield header(tensors, metadata)
    for name in in_file_order(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the hash of a file without writing it."""
    digest = hashlib.sha256()
    for chunk in chunks(tensors, metadata):
        digest.update(chunk)
    return digest.hexdigest()
