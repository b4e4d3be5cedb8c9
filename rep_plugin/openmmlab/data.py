"""Checks of the data sets named in a config, so that a missing or broken one is reported in a line that names the file."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.error import URLError

import mmcv.transforms
import numpy as np

from rep_plugin.errors import ArgumentError, DataError, first_line
from rep_plugin.export.preprocessing import IMAGE_ENDINGS
from rep_plugin.openmmlab.configs import type_name

# They fetch themselves when absent.
_DOWNLOADED = {"MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"}
_WITH_FOLDERS = {"CustomDataset", "ImageNet", "ImageNet21k"}
_EMPTY_LIST_ERROR = "need at least one array to concatenate"


def _leaves(dataset: Any) -> Iterator[dict]:
    """The data sets inside wrappers such as RepeatDataset, ClassBalancedDataset and ConcatDataset."""
    if not isinstance(dataset, dict):
        return
    inner = [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets")
    if inner is None:
        yield dataset
    else:
        for part in inner:
            yield from _leaves(part)


def _required(dataset: dict) -> tuple[list[str], list[str]]:
    """Files and folders a data set needs, relative to its ``data_root``."""
    kind, split = type_name(dataset), dataset.get("split", "")
    if kind == "CUB":
        return ["images.txt", "image_class_labels.txt", "train_test_split.txt"], ["images"]
    if kind == "FGVCAircraft":
        return [f"data/images_variant_{split or 'trainval'}.txt"], ["data/images"]
    if kind == "StanfordCars":
        root = dataset.get("data_root") or ""
        if os.path.exists(os.path.join(root, "cars_annos.mat")):
            return ["cars_annos.mat"], []
        split = split or "train"
        name = f"cars_{split}_annos_withlabels.mat" if split == "test" else f"cars_{split}_annos.mat"
        return [f"devkit/{name}"], [f"cars_{split}"]
    prefix = dataset.get("data_prefix") or ""
    if kind.startswith("ImageNet"):
        prefix = prefix or split
    folders = list(prefix.values()) if isinstance(prefix, dict) else [prefix]
    ann_file = dataset.get("ann_file")
    return [ann_file] if ann_file else [], [folder for folder in folders if folder]


def _has_image(folder: str, endings: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(endings) for _, _, names in os.walk(folder, followlinks=True) for name in names)


def _problem(dataset: dict) -> str | None:
    """What is missing from one data set, or None."""
    kind, root = type_name(dataset), os.path.expanduser(dataset.get("data_root") or "")
    if (kind in _DOWNLOADED and dataset.get("download", True)) or "://" in root:
        return None
    if root and not os.path.isdir(root):
        return f"data_root {root!r} of {kind} does not exist, expected a folder"
    files, folders = ([os.path.join(root, os.path.expanduser(x)) for x in part] for part in _required(dataset))
    for file in files:
        if "://" in file:
            continue
        if not os.path.isfile(file):
            return f"annotation file {file!r} of {kind} does not exist"
        with open(file, "rb") as opened:
            if not opened.read(4096).strip():
                return f"annotation file {file!r} of {kind} is empty, expected at least one image"
    for folder in folders:
        if "://" not in folder and not os.path.isdir(folder):
            return f"image folder {folder!r} of {kind} does not exist"
    if kind in _WITH_FOLDERS and not files:
        endings = tuple(ending.lower() for ending in dataset.get("extensions") or IMAGE_ENDINGS)
        folder = (folders or [root])[0]
        automatic = os.path.join(root, "meta", f"{dataset.get('split')}.txt")
        if not os.path.isfile(automatic) and "://" not in folder and not _has_image(folder, endings):
            return f"image folder {folder!r} of {kind} holds 0 images, expected files ending in {endings}"
    return None


def check_data(cfg: Any, which: Sequence[str] = ("train_dataloader",)) -> None:
    """Check that the data sets of the dataloaders named in ``which`` are there, before anything costly is built.

    Data sets which download themselves or lie at an address are passed over. The message ends with the config's
    ``missing_data_hint``: a text, or {data root: text}, which a config that inherits it for other data does not get. Other
    messages end with the files that the data set expects.

    Args:
        cfg: the config.
        which: names of dataloaders; those that the config does not have, or has as None, are passed over.

    Raises:
        DataError: the folder or an annotation file is missing or empty.
    """
    for name in which:
        loaders = cfg.get(name)
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            for dataset in _leaves((loader or {}).get("dataset")):
                if problem := _problem(dataset):
                    raise DataError(f"{name}: {problem}{_hint(cfg, dataset) or _layout(dataset)}")


def _hint(cfg: Any, dataset: dict) -> str:
    """What the config says of missing data, where it means this data set."""
    hint = cfg.get("missing_data_hint")
    if isinstance(hint, dict):
        root = os.path.normpath(dataset.get("data_root") or "")
        hint = next((text for known, text in hint.items() if os.path.normpath(known) == root), None)
    return f"; {' '.join(hint.split())}" if hint else ""


def _layout(dataset: dict) -> str:
    """The files that a data set expects, in one line."""
    files, folders = _required(dataset)
    root = dataset.get("data_root") or ""
    if type_name(dataset) in _WITH_FOLDERS and not files:
        folders = [os.path.join(folder, "CLASS", "IMAGE.jpg") for folder in folders or [""]]
    expected = ", ".join(os.path.join(root, part) for part in (*files, *folders))
    return f"; expected {expected} (data_root, data_prefix and ann_file of the config)" if expected else ""


def guard_dataloaders(runner: Any) -> None:
    """Let ``runner`` refuse a data set which turns out to hold no image once it is loaded.

    Only this runner is changed. When it then builds a dataloader, DataError is raised for an empty data set.
    """
    build = runner.build_dataloader

    @functools.wraps(build)
    def build_and_check(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            loader = build(dataloader, *args, **kwargs)
        except ValueError as error:
            # mmengine's BaseDataset serializes its list with np.concatenate, which refuses an empty one.
            if _EMPTY_LIST_ERROR not in str(error):
                raise
            raise DataError(_empty(dataloader.get("dataset"))) from None
        except URLError as error:
            leaves = list(_leaves(dataloader.get("dataset")))
            hint = next(filter(None, (_hint(runner.cfg, leaf) for leaf in leaves)), "")
            names = ", ".join(map(type_name, leaves))
            raise DataError(f"{names} cannot be downloaded: {error.reason}{hint}") from None
        if hasattr(loader.dataset, "__len__") and len(loader.dataset) == 0:
            raise DataError(_empty(dataloader.get("dataset") if isinstance(dataloader, dict) else loader.dataset))
        _require_classes(runner, loader.dataset)
        return loader

    runner.build_dataloader = build_and_check


def _require_classes(runner: Any, dataset: Any) -> None:
    """Raise ArgumentError for a classifier that has fewer classes than there are labels: a loss would fail at some batch."""
    head = getattr(getattr(runner.model, "module", runner.model), "head", None)
    number, classes = getattr(head, "num_classes", None), (getattr(dataset, "metainfo", None) or {}).get("classes")
    if not (isinstance(number, int) and isinstance(classes, (list, tuple)) and 0 < number < len(classes)):
        return
    # Of the names that a data set has, its images may show a few.
    labels = [dataset.get_data_info(index).get("gt_label") for index in range(len(dataset))]
    largest = max((label for label in labels if isinstance(label, (int, np.integer))), default=-1)
    if largest >= number:
        raise ArgumentError(
            f"model.head.num_classes (={number}) must be > {largest}, the largest label of {type(dataset).__name__}"
        )


def _empty(dataset: Any) -> str:
    leaves = list(_leaves(dataset))
    names = ", ".join(f"{type_name(leaf)}({leaf.get('data_root') or leaf.get('ann_file')!r})" for leaf in leaves)
    return f"data set {names or type(dataset).__name__} holds 0 images after loading, expected at least 1"


def name_broken_images() -> None:
    """Let LoadImageFromFile name the image it fails on, which it does not for an empty file. Idempotent.

    The class method is wrapped, so that the pipelines of all configs stay as they are. Afterwards loading raises
    DataError for any image that cannot be read.
    """
    loader = mmcv.transforms.LoadImageFromFile
    if hasattr(loader.transform, "__wrapped__"):
        return
    stock = loader.transform

    @functools.wraps(stock)
    def transform(self: Any, results: dict) -> dict | None:
        try:
            return stock(self, results)
        except Exception as error:
            path = results.get("img_path")
            if isinstance(error, FileNotFoundError):
                reason = "the file does not exist"
            elif os.path.isfile(str(path)) and os.path.getsize(path) == 0:
                reason = "the file is empty"
            else:
                reason = first_line(error)
            raise DataError(f"cannot read image {str(path)!r}: {reason}") from None

    loader.transform = transform
