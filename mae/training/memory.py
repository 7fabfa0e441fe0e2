"""Memory of a process: in use, at its peak, and still free, on its GPU or on this machine."""

import ctypes
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

_PROCESS, _MACHINE = Path("/proc/self"), Path("/proc/meminfo")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Files of a control group: its limit, its use, and the entry for cached files within that use. Versions 2 and 1.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_in_use(device: torch.device) -> int:
    """Return the bytes that this process holds now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _kilobytes(_PROCESS / "status", "VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held at a time since `forget_peak_memory`, or since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(_PROCESS / "status", "VmHWM")


def forget_peak_memory(device: torch.device) -> None:
    """Restart the measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without permission, the peak since the start remains, an upper bound
        (_PROCESS / "clear_refs").write_text("5")


def give_back(device: torch.device) -> None:
    """Return unused memory of this process to the device, or to the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(AttributeError):  # a C library other than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def total_memory(device: torch.device) -> int:
    """Return the bytes of the device, or those that all processes of this machine or control group may take."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([_kilobytes(_MACHINE, "MemTotal"), *(limit for limit, _ in _limits())])


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process, or others, could still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_kilobytes(_MACHINE, "MemAvailable"), *(limit - used for limit, used in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each control group around this process, from the innermost outwards."""
    groups = _PROCESS / "cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in _FILES:
            continue
        limit, used, cached = _FILES[controllers]
        # In a container the path may be the machine's, which is not visible: the root is then the container's group.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = _CONTROL_GROUPS / controllers / group.relative_to("/")
            with suppress(OSError, ValueError):  # not visible, or its limit is `max`
                most = int((folder / limit).read_text())
                files = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield most, int((folder / used).read_text()) - (int(files[1]) if files else 0)


def _kilobytes(path: Path, name: str) -> int:
    """Return the entry `name` of a table of the kernel, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
