#!/usr/bin/env python
"""Draw small scenes of disks, boxes and triangles in the layouts that mmdet and mmseg read, for quick training runs.

OUT/train2017, OUT/val2017                  the images
OUT/annotations/instances_{train,val}2017.json   boxes and outlines, COCO's format: CocoDataset(data_root=OUT, ...)
OUT/masks/{train,val}2017                   the class of every pixel (0 background, 1 disk, 2 box, 3 triangle), as PNG

Colour and place say nothing about a class; the same seed gives the same files.

python tools/dataset_converters/make_mini_scenes.py            # data/mini_scenes, 200 + 40 images, a second
"""

import argparse
import json
import os
import shutil
import sys
import uuid
from pathlib import Path

import cv2
import numpy as np


class UsageError(ValueError):
    """An argument does not fit."""


CLASSES = ("disk", "box", "triangle")


def outline(kind: str, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Return the corners (n, 2) of a shape whose corners lie ``radius`` pixels from its centre."""
    corners = {"disk": 24, "box": 4, "triangle": 3}[kind]
    turn = angle + np.arange(corners) * 2 * np.pi / corners
    return np.round(centre + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)).astype(np.int32)


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Return a image (size, size, 3), the class of each pixel, and a COCO annotation for each shape, without ids."""
    low = rng.uniform(0, 255, (size // 16 + 1, size // 16 + 1, 3)).astype(np.float32)
    image = cv2.resize(low, (size, size), interpolation=cv2.INTER_CUBIC)
    mask, found = np.zeros((size, size), np.uint8), []
    cells = rng.permutation(4)[: rng.integers(1, 5)]  # one shape in each, so that none hides another
    for cell in cells:
        radius = rng.uniform(0.14, 0.24) * size
        centre = (np.array([cell % 2, cell // 2]) + 0.5) * size / 2 + rng.uniform(-0.02, 0.02, 2) * size
        label = int(rng.integers(len(CLASSES)))
        corners = outline(CLASSES[label], centre, radius, rng.uniform(0, 2 * np.pi)).clip(0, size - 1)
        cv2.fillPoly(image, [corners], rng.uniform(0, 255, 3).tolist())
        alone = np.zeros_like(mask)
        cv2.fillPoly(alone, [corners], 1)
        mask[alone > 0] = label + 1
        x, y, w, h = cv2.boundingRect(corners)
        found.append(
            dict(
                category_id=label + 1,
                bbox=[x, y, w, h],
                area=int(alone.sum()),
                segmentation=[corners.flatten().tolist()],
                iscrowd=0,
            )
        )
    image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    return image, mask, found


def make_split(out: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write the images, masks and annotations of one split."""
    name = f"{split}2017"
    for folder in (out / name, out / "masks" / name, out / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        image, mask, found = draw(np.random.default_rng([seed, split == "val", index]), size)
        cv2.imwrite(str(out / name / f"{index:06d}.jpg"), image)
        cv2.imwrite(str(out / "masks" / name / f"{index:06d}.png"), mask)
        images.append(dict(id=index, file_name=f"{index:06d}.jpg", width=size, height=size))
        annotations += [dict(one, image_id=index, id=len(annotations) + i + 1) for i, one in enumerate(found)]
    categories = [dict(id=i + 1, name=kind) for i, kind in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (out / "annotations" / f"instances_{name}.json").write_text(json.dumps(content) + "\n")


def make(out: Path, train: int = 200, val: int = 40, size: int = 128, seed: int = 0) -> None:
    """Make the whole set, or nothing. Raises FileExistsError for a folder that exists, UsageError for bad numbers."""
    if out.exists():
        raise FileExistsError(f"{out} exists, expected a new folder")
    limits = {"train": (1, 10**6), "val": (1, 10**6), "size": (32, 4096), "seed": (0, 2**63 - 1)}
    for (name, (low, high)), value in zip(limits.items(), (train, val, size, seed)):
        if not low <= value <= high:
            raise UsageError(f"{name} must be in [{low}, {high}], got {value}")
    work = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    try:
        make_split(work, "train", train, size, seed)
        make_split(work, "val", val, size, seed)
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Read the command line, draw, say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/mini_scenes"), help="folder to make")
    parser.add_argument("--train", type=int, default=200, help="images to train on")
    parser.add_argument("--val", type=int, default=40, help="images to validate on")
    parser.add_argument("--size", type=int, default=128, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    args = parser.parse_args()
    try:
        make(args.out, args.train, args.val, args.size, args.seed)
    except (UsageError, OSError) as error:
        sys.exit(f"error: --out {args.out}: {error}" if isinstance(error, OSError) else f"error: {error}")
    print(f"{args.out}: made {args.train} + {args.val} images of {args.size} pixels, seed {args.seed}")


if __name__ == "__main__":
    main()
