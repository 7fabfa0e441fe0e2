"""Checks of this machine: libraries, devices, shared memory, open files and cores."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

from mae.doctor.examination import Examination
from mae.doctor.finding import Finding, gigabytes
from mae.output import counted
from mae.versions import installed

_DISTRIBUTION = "mae-pretraining"
_SHOWN = ("torch", "torchvision", "timm", "accelerate", "webdataset")
_FREE_SHARE_OF_AN_IDLE_GPU = 0.9


def versions(_: Examination) -> Finding:
    """Check the versions of all libraries against the requirements of this program."""
    python = f"python {platform.python_version()}"
    own = installed(_DISTRIBUTION)
    if own is None:
        warning = f"{_DISTRIBUTION} is not installed, so its requirements are unknown; pip install it"
        return Finding(python, warnings=(warning,))
    stated = [Requirement(text) for text in requires(_DISTRIBUTION) or []]
    needed = [r for r in stated if r.marker is None or r.marker.evaluate({"extra": ""})]
    shown = ", ".join(f"{name} {installed(name) or 'missing'}" for name in _SHOWN)
    return Finding(f"{python}, mae {own}, {shown}", problems=tuple(_misfits(needed)))


def _misfits(needed: list[Requirement]) -> Iterator[str]:
    for requirement in needed:
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield (
                f"{requirement.name} is {found or 'missing'}, but {requirement.specifier or 'any version'} is needed: "
                f"pip install '{requirement}'"
            )


def devices(_: Examination) -> Finding:
    """Check cores and GPUs; a GPU that torch cannot use is a problem, because the run would silently be slow."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = f"{len(os.sched_getaffinity(0))} CPU cores, {gigabytes(memory)}"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} {gigabytes(gpu.total_memory)}" for gpu in gpus)
        return Finding(
            f"{counted(len(gpus), 'GPU')}: {names}; driver {_driver()}, {cores}", warnings=tuple(_busy_gpus())
        )
    if _driver() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        return Finding(
            cores,
            problems=(
                f"there is an NVIDIA driver, {_driver()}, but torch {torch.__version__}, built for {cuda}, finds no "
                "GPU: install a build of torch that fits the driver, check CUDA_VISIBLE_DEVICES, or set "
                "ACCELERATE_USE_CPU=true to train on the CPU",
            ),
        )
    return Finding(f"no GPU, {cores}")


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty if there is none."""
    with suppress(OSError):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else "of unknown version"
    return ""


def _busy_gpus() -> Iterator[str]:
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        if free < _FREE_SHARE_OF_AN_IDLE_GPU * total:
            yield f"GPU {number} has {gigabytes(free)} of {gigabytes(total)} free: another program uses it"


def precision(examination: Examination) -> Finding:
    """Check that the device can compute in the precision of the settings."""
    mixed = examination.accelerator.mixed_precision
    found = f"{examination.settings.precision} means {'fp32' if mixed == 'no' else mixed} on {examination.device}"
    if examination.device.type == "cuda" and mixed == "no" and examination.settings.precision == "auto":
        return Finding(
            found, warnings=("this GPU has no bf16, so the run takes more memory and time than on a GPU with bf16",)
        )
    return Finding(found)


def shared_memory(examination: Examination) -> Finding:
    """Check that the batches that workers prepare ahead fit into shared memory."""
    return Finding(examination.shared_memory)


def open_files(examination: Examination) -> Finding:
    """Check that a process may open enough files for shards and workers."""
    return Finding(examination.open_files)


def processors(examination: Examination) -> Finding:
    """Check that there are not more processes and threads than cores."""
    data, here, cores = examination.settings.data, examination.local_processes, examination.cores
    decoding, threads = here * data.workers * data.threads, torch.get_num_threads()
    found = f"{counted(cores, 'core')} for {counted(here, 'process')} with {counted(data.workers, 'worker')}"
    if data.threads > 1:
        found += f" of {counted(data.threads, 'thread')}"
    omp = os.environ.get("OMP_NUM_THREADS")
    found += f" each; OMP_NUM_THREADS is {omp or 'not set'}, torch computes with {counted(threads, 'thread')}"
    warnings = []
    if (busy := os.getloadavg()[0]) > cores:
        warnings.append(f"other programs use the cores (load {busy:.1f}), so all times below are too long")
    if decoding > cores:
        fewer = cores // (here * data.threads)
        warnings.append(f"{decoding} threads decode on {cores} cores: set --data.workers {fewer}")
    if examination.device.type == "cpu" and here * threads > cores:
        remedy = f"set OMP_NUM_THREADS={cores // here}" if here <= cores else "start fewer processes"
        warnings.append(f"{here * threads} threads compute on {cores} cores: {remedy}")
    return Finding(found, warnings=tuple(warnings))
