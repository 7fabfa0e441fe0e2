"""How much memory a process takes, has taken at most, and could still have: of its GPU, or of this machine."""

import ctypes
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

_PROCESS, _MACHINE = Path("/proc/self"), Path("/proc/meminfo")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Of a control group: its limit, what is in use, and the part of that which is only cached files. Versions 2 and 1.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _kilobytes(_PROCESS / "status", "VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes at a time since `forget_peak_memory`, or since the begin of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(_PROCESS / "status", "VmHWM")


def forget_peak_memory(device: torch.device) -> None:
    """Look for the most memory in use from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # where it is not permitted, the peak of the whole process so far is an upper bound
        (_PROCESS / "clear_refs").write_text("5")


def give_back(device: torch.device) -> None:
    """Return what is free within this process to the device, or to the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(AttributeError):  # a C library that is not GNU's
        ctypes.CDLL(None).malloc_trim(0)


def total_memory(device: torch.device) -> int:
    """Bytes of the device, or that all processes of this machine, or of this job on it, may take together."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([_kilobytes(_MACHINE, "MemTotal"), *(limit for limit, _ in _limits())])


def free_memory(device: torch.device) -> int:
    """Bytes that this process, or others, could still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_kilobytes(_MACHINE, "MemAvailable"), *(limit - used for limit, used in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in, out to the outermost; there need be none."""
    groups = _PROCESS / "cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in _FILES:
            continue
        limit, used, cached = _FILES[controllers]
        # Within a container the path may be that of the machine, which does not show here; its own is the root then.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = _CONTROL_GROUPS / controllers / group.relative_to("/")
            with suppress(OSError, ValueError):  # not shown, or its limit is `max`
                most = int((folder / limit).read_text())
                files = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield most, int((folder / used).read_text()) - (int(files[1]) if files else 0)


def _kilobytes(path: Path, name: str) -> int:
    """The entry `name` of a table of the kernel, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
