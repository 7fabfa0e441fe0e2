"""Stage loader: how many cores a GPU needs, JPEGs decoded by nvJPEG, and how long a real run waits for data.

Photos are those of `photos-*.tar` among the shards, repeated; without them, smooth noise of the usual size.
"""

import io
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import runs
from .commands import mae
from .measurement import Measurement
from .place import ROOT, Place
from .results import Figures
from .worker import Worker

SIDE, BATCH = 224, 128
WORKERS, WORKERS_OF_DEVICE = (1, 2, 4, 8, 12, 16), (1, 2, 4)
_STEPS, _LOG_EVERY = 120, 20
_TOY = (
    "--data.image_size", 32, "--model.size", "tiny", "--model.depth", 1, "--model.patch_size", 8,
    "--model.decoder_depth", 1,
)  # fmt: skip


def measurements(place: Place, worker: Worker) -> Iterator[Measurement]:
    """Return the measurements of this stage, the most important first."""
    side, batch = (32, 4) if place.rehearse else (SIDE, BATCH)
    photos = place.work / "photos"
    yield Measurement("photos", partial(write_photos, place, worker, photos))
    counts = (1,) if place.rehearse else [count for count in WORKERS if count <= max(1, place.cpus)]
    of_device = (1,) if place.rehearse else WORKERS_OF_DEVICE
    for where, numbers in (("cpu", counts), ("device", of_device)):
        for count in numbers:
            run = partial(
                worker.ask, "loader_rows.measure", str(photos), where, count, side, batch, place.rehearse, limit=90.0
            )
            yield Measurement(f"decoded on {where}, {count} workers", run)
    for where in ("cpu", "device"):
        yield Measurement(f"mae pretrain, decoded on {where}", partial(end_to_end, place, photos, where), least=60.0)


def write_photos(place: Place, worker: Worker, folder: Path) -> Figures:
    """Write the shards that this stage reads."""
    jpegs = [data for path in place.found("**/photos-*.tar") for data in _jpegs(Path(path))]
    is_real, count = bool(jpegs), 24 if place.rehearse else 4000
    if not is_real:
        noise = place.work / "noise.tar"
        worker.ask("loader_rows.write_noise", str(noise), 8 if place.rehearse else 200)
        jpegs = _jpegs(noise)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard, count, 4):
                for ending, content in (("jpg", jpegs[number % len(jpegs)]), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"different_photos": len(jpegs), "are_real": is_real, "mean_bytes": sum(map(len, jpegs)) / len(jpegs)}


def _jpegs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith((".jpg", ".jpeg"))]
        return [file.read() for file in files if file is not None]


def end_to_end(place: Place, photos: Path, where: str) -> Figures:
    """Return medians of what `mae pretrain` of ViT-B/16 logs, with one worker per core, except one core."""
    run, batch = place.work / "loader" / where, 8 if place.rehearse else 256
    steps, every = (6, 2) if place.rehearse else (_STEPS, _LOG_EVERY)
    samples = 24 if place.rehearse else 4000
    workers = 1 if place.rehearse else max(1, place.cpus - 1)
    mae(
        place, "pretrain", "--config", ROOT / "configs" / "pretrain" / "vit_base.yaml", "--data.shards",
        f"{photos}/*.tar", "--run_dir", run, "--data.workers", workers, "--data.decode_on", where, "--batch_size",
        batch, "--epochs", steps * batch / samples, "--optim.warmup_epochs", 0, "--log_every", every,
        "--checkpoint_every", steps, *(_TOY if place.rehearse else ()), limit=150.0,
    )  # fmt: skip
    return {"workers": workers, **runs.speed(run)}
