"""Where a call runs: its folders, its time, and the environment of the processes that it starts."""

import os
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from pathlib import Path

from .results import FailedError

ROOT = Path(__file__).parents[2]
NEEDED = (
    "torch", "torchvision", "timm", "accelerate", "webdataset", "tyro", "yaml", "safetensors", "sklearn",
    "matplotlib", "rich", "numpy", "PIL", "braceexpand", "jaxtyping", "simplejpeg", "fsspec", "tenacity", "packaging",
)  # fmt: skip
"""Modules that the commands of the stages import."""
# To end what is running takes up to 7 seconds; the rest is for slow machines.
_MARGIN_SHARE, _LEAST_MARGIN, _MOST_MARGIN = 0.03, 8.0, 15.0


@dataclass(frozen=True)
class Place:
    """Folders and time of one call."""

    out: Path
    """Folder of what comes back: JSON, Markdown, curves, pictures."""
    shards: Path | None
    """Folder with the tars of `benchmarks/gpu.md`."""
    rehearse: bool
    deadline: float
    """Time of `time.monotonic` at which everything must have ended."""
    flags: tuple[str, ...] = ()
    """Further settings of `mae pretrain` in the stage learn."""
    epochs: float = 2000.0
    """Epochs of the stage learn."""

    @property
    def work(self) -> Path:
        """Folder of what stays: runs, unpacked wheels, logs, caches."""
        return self.out / "work"

    @property
    def site(self) -> Path:
        """Folder of importable modules: unpacked wheels, and `mae` as an installed package has it."""
        return self.work / "site"

    @property
    def cpus(self) -> int:
        """Number of processors that this process may use."""
        return len(os.sched_getaffinity(0))

    def seconds_left(self) -> float:
        """Return the seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def environment(self) -> dict[str, str]:
        """Return the environment of started processes."""
        paths = [self.site, ROOT / "benchmarks", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONSAFEPATH": "1",  # `mae` of the current folder lacks `pipelines`; the one in `site` has it
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if self.rehearse:
            own |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return os.environ | own

    def found(self, pattern: str) -> list[str]:
        """Return the paths of the tars that match `pattern`."""
        return sorted(map(str, self.shards.glob(pattern))) if self.shards else []


def deadline_after(minutes: float) -> float:
    """Return the time of `time.monotonic` by which all must have ended, a little before the minutes are over."""
    seconds = 60 * minutes
    return time.monotonic() + seconds - min(max(_MARGIN_SHARE * seconds, _LEAST_MARGIN), _MOST_MARGIN)


def make_importable(site: Path, wheels: Path | None) -> None:
    """Fill `site` with the wheels and with `mae`, which pip would put together from several folders.

    Raises:
        FailedError: if a module is missing; it names all that are.
    """
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        _unpack(wheel, site)
    _link_package(site / "mae")
    missing = missing_modules(NEEDED, site)
    if missing:
        raise FailedError(
            f"Python {sys.version_info.major}.{sys.version_info.minor} finds no module {', '.join(missing)}; put their "
            "wheels into the folder that --wheels names (benchmarks/gpu.md says how)"
        )


def missing_modules(names: Iterable[str], site: Path) -> list[str]:
    """Return the modules that neither this Python nor the folder `site` has."""
    invalidate_caches()
    return [name for name in names if PathFinder.find_spec(name, [str(site), *sys.path]) is None]


def _unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel once; files of `NAME.data/purelib` and `platlib` belong into the same folder."""
    mark = site / f".{wheel.name}"
    if mark.exists():
        return
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            first, _, rest = member.filename.partition("/")
            if first.endswith(".data"):
                kind, _, rest = rest.partition("/")
                if kind not in ("purelib", "platlib") or not rest:
                    continue
                member.filename = rest
            archive.extract(member, site)
    mark.touch()


def _link_package(package: Path) -> None:
    """Make the package `mae` from links, with `pipelines` and `configs` in it, as pyproject.toml maps them."""
    package.mkdir(exist_ok=True)
    parts = [path for path in (ROOT / "mae").iterdir() if path.name != "__pycache__"]
    for part in [*parts, ROOT / "pipelines", ROOT / "configs"]:
        link = package / part.name
        if not link.is_symlink():
            link.symlink_to(part)
