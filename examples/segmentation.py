"""Segment images with an exported encoder: a linear head on frozen patches, and the tuned encoder, beside baselines.

python examples/segmentation.py --train train.tar --val val.tar --test test.tar --encoder ENCODER --out figures.json
Each sample is KEY.jpg (or .png) and KEY.seg.png, an 8-bit map of classes; the class --ignore counts nowhere. Each way
to train takes the learning rate that is the best on --val with the first seed.
"""

import argparse
import io
from operator import itemgetter
from pathlib import Path

import numpy as np
import timm
import torch
from inputs import count, decoded, exported, image_of, parser_of, record, resumed, store
from iou import confusion, intersection_over_union
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from mae.errors import UserError, one_line_errors


def read(path: Path, args: argparse.Namespace) -> list[Tensor]:
    """Read images as [n, 3, height, width] in 0..1 and masks as [n, height, width]; refuse classes not allowed."""
    size = args.size[::-1]

    def decode(sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        image, mask = (Image.open(io.BytesIO(data)) for data in (image_of(sample), sample["seg.png"]))
        if mask.mode not in ("L", "P"):
            raise ValueError(f"the mask is {mask.mode}")
        return np.asarray(image.convert("RGB").resize(size)), np.asarray(mask.resize(size, Image.Resampling.NEAREST))

    images, masks = zip(*decoded(path, None, "KEY.jpg or KEY.png, and KEY.seg.png of 8 bits", decode), strict=True)
    labels = torch.tensor(np.stack(masks)).long()
    if (labels[labels != args.ignore] >= args.classes).any():
        raise UserError(f"{path} has class {labels.max()}; allowed: below --classes {args.classes}, and --ignore")
    return [torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255, labels]


class Encoder(nn.Module):
    """A ViT that gives a map of its patch tokens, or a CNN that gives its stride-16 map."""

    def __init__(self, name: str, pretrained: bool, size: list[int]) -> None:
        super().__init__()
        self.is_vit = "resnet" not in name
        options = {"img_size": size, "num_classes": 0} if self.is_vit else {"features_only": True, "out_indices": [3]}
        self.net = timm.create_model(name, pretrained=pretrained, **options)
        self.width = self.net.embed_dim if self.is_vit else self.net.feature_info.channels()[-1]
        for figure in ("mean", "std"):
            self.register_buffer(figure, torch.tensor(self.net.pretrained_cfg[figure]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return features [n, width, rows, columns] of images in 0..1."""
        images = (images - self.mean) / self.std
        if not self.is_vit:
            return self.net(images)[0]
        patches = self.net.forward_features(images)[:, self.net.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.net.patch_embed.grid_size)


@torch.no_grad()
def in_batches(net: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of `net` in evaluation mode."""
    net.eval()
    return torch.cat([net(part) for part in inputs.split(8)])


def train(net: nn.Module, inputs: Tensor, masks: Tensor, args: argparse.Namespace, rate: float, epochs: int) -> None:
    """Train by AdamW under a one-cycle schedule; the loss is taken at the size of the masks."""
    net.train()
    batches = -(-len(inputs) // args.batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).chunk(batches):
            logits = interpolate(net(inputs[chosen]), size=masks.shape[1:], mode="bilinear")
            loss = cross_entropy(logits, masks[chosen], ignore_index=args.ignore)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def measure(
    way: tuple, seed: int, rate: float, known: list[Tensor], test: list[Tensor], args: argparse.Namespace
) -> dict:
    """Train in one way with a seed and a rate on the known images and masks, and measure it on the test images."""
    name, pretrained, frozen = way
    torch.manual_seed(seed)
    encoder = Encoder(name, pretrained, args.size)
    head = nn.Sequential(nn.BatchNorm2d(encoder.width), nn.Conv2d(encoder.width, args.classes, 1))
    if frozen:
        train(head, in_batches(encoder, known[0]), known[1], args, rate, args.head_epochs)
    else:
        train(nn.Sequential(encoder, head), *known, args, rate, args.epochs)
    counts = torch.zeros(args.classes, args.classes, dtype=torch.long)
    for part, true in zip(*(tensor.split(8) for tensor in test), strict=True):
        logits = interpolate(in_batches(nn.Sequential(encoder, head), part), size=true.shape[1:], mode="bilinear")
        counts += confusion(true, logits.argmax(1), args.classes, args.ignore)
    miou = intersection_over_union(counts).nanmean().item()
    return {"seed": seed, "rate": rate, "miou": miou, "pixels": counts.tolist()}


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments, and measure; a mistake in them ends with one line and exit code 2."""
    parser = parser_of(__doc__, ("train", "val", "test", "encoder", "out"))
    parser.add_argument("--size", type=int, nargs=2, default=[176, 240], help="height and width, multiples of a patch")
    parser.add_argument("--masks", type=count, help="train on the first so many images only")
    for name, default in {"classes": 11, "ignore": 11, "batch": 8, "epochs": 40, "head_epochs": 40}.items():
        parser.add_argument(f"--{name}", type=count if name != "ignore" else int, default=default)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3], help="of the tuned encoders"
    )
    parser.add_argument("--head_rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1], help="of a head alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(arguments)
    with one_line_errors():
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Measure each row with each seed; the file is written after each, and the same command goes on after a stop."""
    found, vit = resumed(record(args), args.out), exported(args.encoder, args.size)
    known = [each[: args.masks] for each in read(args.train, args)]
    sets = {"val": read(args.val, args), "test": read(args.test, args)}
    rows = {
        "frozen, pretrained": (vit, True, True),
        "frozen, untrained": (vit, False, True),
        "tuned, pretrained": (vit, True, False),
        "tuned, from scratch": (vit, False, False),
        "resnet18, from scratch": ("resnet18", False, False),
    }
    for row, way in rows.items():
        trials, rates = found["rows"].setdefault(row, []), args.head_rates if way[2] else args.rates
        while len(trials) < len(rates) + len(args.seeds):
            if (done := len(trials) - len(rates)) < 0:
                images, seed, rate = "val", args.seeds[0], rates[len(trials)]
            else:
                images, seed, rate = "test", args.seeds[done], max(trials[: len(rates)], key=itemgetter("miou"))["rate"]
            trials.append({"images": images, **measure(way, seed, rate, known, sets[images], args)})
            print(f"{row}, {images}, seed {seed}, rate {rate:g}: mIoU {100 * trials[-1]['miou']:.1f} %", flush=True)
            store(found, args.out)


if __name__ == "__main__":
    main()
