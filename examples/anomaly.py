"""Find defects with a pretraining run and its exported encoder, beside raw pixels and the difference to the template.

python examples/anomaly.py --train good.tar --test test.tar --encoder ENCODER --run RUN --out anomaly.json
Each sample is KEY.jpg with KEY.json, which holds `boxes` as [x1, y1, x2, y2, type]; in --test, each two samples that
follow each other are a template without a defect and the image to be checked.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from inputs import count, decoded, exported, image_of, parser_of, record, store
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import avg_pool2d, normalize

import mae
from mae.errors import UserError, one_line_errors


def read(path: Path, side: int, patch: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """Read images as [n, 1, side, side] in 0..1, and which patches touch a box as [n, patches]."""

    def decode(sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        image = Image.open(io.BytesIO(image_of(sample))).convert("L")
        mark, (x, y) = np.zeros((side // patch, side // patch), bool), (side / patch / each for each in image.size)
        for x1, y1, x2, y2, *_ in json.loads(sample["json"])["boxes"]:
            rows = slice(int(y1 * y), int(np.ceil(y2 * y)))
            mark[rows, int(x1 * x) : int(np.ceil(x2 * x))] = True
        return np.asarray(image.resize((side, side), Image.Resampling.BOX)), mark.ravel()

    images, marks = zip(*decoded(path, limit, "KEY.jpg or KEY.png, and KEY.json with `boxes`", decode), strict=True)
    return torch.tensor(np.stack(images))[:, None] / 255, torch.tensor(np.stack(marks))


def cut(images: Tensor, side: int) -> Tensor:
    """Cut [n, channels, height, width] into squares [n * squares, channels, side, side], row by row."""
    squares = images.unfold(2, side, side).unfold(3, side, side)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def joined(values: Tensor, images: int) -> Tensor:
    """Put values [tiles, rows, columns, ...] of square tiles together as [images, patches, ...]."""
    tiles = round((len(values) / images) ** 0.5)
    grid = values.unflatten(0, (images, tiles, tiles)).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 3)


@torch.no_grad()
def tokens(net: Module, images: Tensor, tile: int, block: int) -> Tensor:
    """Return the patch tokens [tiles, rows, columns, width] after a block, counted from 0; after the last, normed."""
    mean, std = (torch.tensor(net.pretrained_cfg[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    wanted = {"indices": [block], "norm": block == len(net.blocks) - 1, "intermediates_only": True, "stop_early": True}
    parts = [net.forward_intermediates(part, **wanted)[0] for part in ((cut(images, tile) - mean) / std).split(8)]
    return torch.cat(parts).permute(0, 2, 3, 1)


def by_tokens(net: Module, good: Tensor, images: Tensor, tile: int, chosen: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield how tokens are read and the distance of each patch [n, patches] to the nearest of the chosen good ones."""
    for after, block in (("", len(net.blocks) - 1), (", after 1 block", 0)):
        kept, tested = (tokens(net, part, tile, block) for part in (good, images))
        # The mean of all good tiles at a place in the tile tells the place, not the board.
        for less, mean in (("", 0.0), (", less the mean of its place", kept.mean(0))):
            bank, queries = (normalize(part - mean, dim=-1) for part in (kept, tested))
            yield after + less, nearest(joined(queries, len(images)), joined(bank, len(good)).flatten(0, 1)[chosen])


def nearest(queries: Tensor, bank: Tensor) -> Tensor:
    """Return half the squared distance of each query [n, patches, width] to its nearest row of the bank.

    For vectors of length 1 that is 1 - cosine.
    """
    half = bank.square().sum(1) / 2
    return torch.stack([(half - q @ bank.T).min(1).values + q.square().sum(1) / 2 for q in queries])


def reconstruction_error(model: "mae.Model", images: Tensor, tile: int, patch: int, masks: int, seed: int) -> Tensor:
    """Return the squared pixel error [n, patches], averaged over the masks under which a patch was hidden."""
    total, count = torch.zeros(()), torch.zeros(())
    for number in range(masks):
        found = model.reconstruct(list(cut(images, tile)), seed=seed * masks + number)
        error = avg_pool2d((found.rebuilt - found.original).square().mean(1), patch)
        total, count = total + error * found.hidden, count + found.hidden.float()
    return joined(total / count.clamp(min=1), len(images))


def figures(scores: Tensor, marks: Tensor) -> dict[str, float]:
    """Return AUROCs of images, by maximum and mean of the top 1 %, and of patches, of all and of defective images."""
    bad, top = marks.any(1), scores.topk(max(1, scores.shape[1] // 100), dim=1).values
    return {
        "image, max": roc_auc_score(bad, top[:, 0]),
        "image, top 1 %": roc_auc_score(bad, top.mean(1)),
        "patch": roc_auc_score(marks.ravel(), scores.ravel()),
        "patch, defective images": roc_auc_score(marks[bad].ravel(), scores[bad].ravel()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, and measure; a mistake in them ends with one line and exit code 2."""
    parser = parser_of(__doc__, ("train", "test", "encoder", "run", "out"))
    for name, default in {"side": 320, "tile": 160, "patch": 8, "bank": 10000, "masks": 32}.items():
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--limit", type=count, help="use the first so many test images only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(arguments)
    with one_line_errors():
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Measure each way of scoring patches; the file is written after each."""
    found, encoder, model = record(args), exported(args.encoder, (args.tile,) * 2, args.patch), mae.load(args.run)
    if model.description.decoder is None:
        raise UserError(f"{args.run} has no decoder; give the run of a pretraining")
    if args.side % args.tile or args.tile % args.patch:
        raise UserError(f"--tile {args.tile} must divide --side {args.side}, and --patch {args.patch} the tile")
    good, _ = read(args.train, args.side, args.patch, None)
    images, marks = read(args.test, args.side, args.patch, args.limit)
    if len(images) % 2 or marks[::2].any() or not marks[1::2].any(1).all():
        raise UserError(f"{args.test} must hold pairs: an image without a box, then one with boxes")

    def note(row: str, seed: int, scores: Tensor) -> None:
        found["rows"].setdefault(row, []).append({"seed": seed, **figures(scores, marks)})
        print(row, found["rows"][row][-1], flush=True)
        store(found, args.out)

    pixels = [cut(part, args.patch).flatten(1).unflatten(0, (len(part), -1)) for part in (good, images)]
    note("difference to the template", 0, (pixels[1] - pixels[1][::2].repeat_interleave(2, 0)).square().mean(2))
    for seed in args.seeds:
        torch.manual_seed(seed)
        chosen = torch.randperm(good.shape[0] * pixels[0].shape[1])[: args.bank]
        note("raw pixels", seed, nearest(pixels[1], pixels[0].flatten(0, 1)[chosen]))
        for row, pretrained in (("untrained encoder", False), ("pretrained encoder", True)):
            net = timm.create_model(encoder, pretrained=pretrained, img_size=args.tile).eval()
            for how, scores in by_tokens(net, good, images, args.tile, chosen):
                note(f"{row}{how}", seed, scores)
    error = reconstruction_error(model, images, args.tile, args.patch, args.masks, args.seeds[0])
    note(f"reconstruction error, {args.masks} masks", args.seeds[0], error)


if __name__ == "__main__":
    main()
