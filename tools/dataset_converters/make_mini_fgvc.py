"""Renders a small fine-grained bird data set in the folder layout of a public one, for quick training runs.

All classes are the same bird and differ only in local parts: crown, beak, wing bars, breast, eye ring, tail tip. Hue,
pose, scale, background and light vary inside every class, so a network has to look at the parts. ``--layout`` picks
whose files are reproduced, so that the stock loader of mmpretrain reads them unchanged:

* ``cub``       CUB-200-2011:        ``CUB(data_root=OUT, split="train" | "test")``
* ``cars``      Stanford Cars:       ``StanfordCars(data_root=OUT, split="train" | "test")``
* ``aircraft``  FGVC-Aircraft 2013b: ``FGVCAircraft(data_root=OUT, split="train" | "val" | "trainval" | "test")``

``cars`` and ``aircraft`` hold the very same birds: only the annotation layout is that of the data set. The loaders keep
their own long class lists (200, 196 and 100 names), of which the first ``--classes`` labels are used; set
``num_classes`` of the head to ``--classes``. ``mini_fgvc.json``, written last, records the parameters and the parts of
each class.

    python tools/dataset_converters/make_mini_fgvc.py                         # data/mini_cub, 20 x (300 + 40) images
    python tools/dataset_converters/make_mini_fgvc.py --layout cars --seed 1 --contact-sheet birds.png
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Loaded by path (tests) as well as run as a script, and worker processes must find the drawing module in both cases.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import _birds


class UsageError(ValueError):
    """An argument or a folder does not fit. Every worker process imports this file, so it imports nothing heavy for it."""


MARKER = "mini_fgvc.json"
# Raise when the images drawn for given parameters change, so that old folders are not taken for new ones.
DRAWING = 1
LAYOUTS = ("cub", "cars", "aircraft")
SIZES = (32, 1024)
MOST = 100_000  # images a class: more is a slip
# FGVCAircraft looks names up in its own list: the first n of it stand for the n bird classes.
_AIRCRAFT = (
    "707-320|727-200|737-200|737-300|737-400|737-500|737-600|737-700|737-800|737-900|747-100|747-200|747-300|747-400|"
    "757-200|757-300|767-200|767-300|767-400|777-200|777-300|A300B4|A310|A318|A319|A320|A321|A330-200|A330-300|"
    "A340-200|A340-300|A340-500|A340-600|A380|ATR-42|ATR-72|An-12|BAE 146-200|BAE 146-300|BAE-125|Beechcraft 1900|"
    "Boeing 717|C-130|C-47|CRJ-200|CRJ-700|CRJ-900|Cessna 172|Cessna 208|Cessna 525|Cessna 560|Challenger 600|DC-10|"
    "DC-3|DC-6|DC-8|DC-9-30|DH-82|DHC-1|DHC-6|DHC-8-100|DHC-8-300|DR-400|Dornier 328|E-170|E-190|E-195|EMB-120|"
    "ERJ 135|ERJ 145|Embraer Legacy 600|Eurofighter Typhoon|F-16A/B|F/A-18|Falcon 2000|Falcon 900|Fokker 100|"
    "Fokker 50|Fokker 70|Global Express|Gulfstream IV|Gulfstream V|Hawk T1|Il-76|L-1011|MD-11|MD-80|MD-87|MD-90|"
    "Metroliner|Model B200|PA-28|SR-20|Saab 2000|Saab 340|Spitfire|Tornado|Tu-134|Tu-154|Yak-42"
)
AIRCRAFT_NAMES = _AIRCRAFT.split("|")
ANNOTATIONS = {
    "cub": ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "bounding_boxes.txt"),
    "cars": ("cars_annos.mat",),
    "aircraft": (
        *(f"data/images_variant_{s}.txt" for s in ("train", "val", "trainval", "test")),
        "data/variants.txt",
        "data/images_box.txt",
    ),
}


@dataclasses.dataclass(frozen=True)
class Params:
    """What decides every byte of a set: counts per class, ``size`` in pixels, ``seed`` and the layout.

    Raises UsageError, naming the value and the limits, if a field is out of range.
    """

    layout: str = "cub"
    classes: int = 20
    train_per_class: int = 300
    test_per_class: int = 40
    size: int = 128
    seed: int = 0
    drawing: int = DRAWING

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        # The aircraft layout splits the training images into train and val, and its loader needs both non-empty.
        least_train = 2 if self.layout == "aircraft" else 1
        for name, low, high in (
            ("classes", 2, _birds.MAX_CLASSES),
            ("train_per_class", least_train, MOST),
            ("test_per_class", 1, MOST),
            ("size", *SIZES),
            ("seed", 0, 2**63 - 1),
        ):
            _require_in(name, getattr(self, name), low, high)


def _require_in(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, expected {low} to {high} (maximum {high})")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image: 1-based ``number`` in the whole set, 0-based ``label``, ``index`` in its class, split, path."""

    number: int
    label: int
    index: int
    train: bool
    path: str


def images(params: Params) -> list:
    """All images of a set, ordered by class, the training images of a class first."""
    out = []
    for label in range(params.classes):
        name = _birds.class_name(label)
        for index in range(params.train_per_class + params.test_per_class):
            number = len(out) + 1
            path = {
                "cub": f"images/{label + 1:03d}.{name}/{name}_{index + 1:04d}.jpg",
                "cars": f"car_ims/{number:06d}.jpg",
                "aircraft": f"data/images/{number:07d}.jpg",
            }[params.layout]
            out.append(Sample(number, label, index, index < params.train_per_class, path))
    return out


def _write_lines(path: Path, lines: list) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _write_cub(root: Path, params: Params, pics: list, boxes: list) -> None:
    _write_lines(root / "images.txt", [f"{p.number} {p.path.removeprefix('images/')}" for p in pics])
    _write_lines(root / "image_class_labels.txt", [f"{p.number} {p.label + 1}" for p in pics])
    _write_lines(root / "train_test_split.txt", [f"{p.number} {int(p.train)}" for p in pics])
    names = [f"{i + 1} {i + 1:03d}.{_birds.class_name(i)}" for i in range(params.classes)]
    _write_lines(root / "classes.txt", names)
    rows = [f"{p.number} " + " ".join(f"{v:.1f}" for v in box) for p, box in zip(pics, boxes)]
    _write_lines(root / "bounding_boxes.txt", rows)


def _write_cars(root: Path, params: Params, pics: list, boxes: list) -> None:
    import mat4py  # comes with mmpretrain, whose loader reads the file with it

    annotations = {
        "relative_im_path": [p.path for p in pics],
        "bbox_x1": [x + 1 for x, _, _, _ in boxes],
        "bbox_y1": [y + 1 for _, y, _, _ in boxes],
        "bbox_x2": [x + w for x, _, w, _ in boxes],
        "bbox_y2": [y + h for _, y, _, h in boxes],
        "class": [p.label + 1 for p in pics],
        "test": [int(not p.train) for p in pics],
    }
    path = root / "cars_annos.mat"
    names = [_birds.class_name(i) for i in range(params.classes)]
    mat4py.savemat(str(path), {"annotations": annotations, "class_names": names})
    # The 116 bytes of free text at the start hold the time of writing; the same seed must give the same bytes.
    with open(path, "r+b") as file:
        file.write(b"MATLAB 5.0 MAT-file, created by make_mini_fgvc.py".ljust(116))


def _write_aircraft(root: Path, params: Params, pics: list, boxes: list) -> None:
    splits = {"train": [], "val": [], "trainval": [], "test": []}
    for p in pics:
        row = f"{p.number:07d} {AIRCRAFT_NAMES[p.label]}"
        for split in ("trainval", "val" if p.index % 2 else "train") if p.train else ("test",):
            splits[split].append(row)
    for split, rows in splits.items():
        _write_lines(root / "data" / f"images_variant_{split}.txt", rows)
    _write_lines(root / "data" / "variants.txt", list(AIRCRAFT_NAMES[: params.classes]))
    rows = [f"{p.number:07d} {x + 1} {y + 1} {x + w} {y + h}" for p, (x, y, w, h) in zip(pics, boxes)]
    _write_lines(root / "data" / "images_box.txt", rows)


def _is_complete(out: Path, params: Params, overwrite: bool) -> bool:
    """True if ``out`` already holds this very set; UsageError if it holds anything that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder or a new name")
    try:
        held = Params(**json.loads((out / MARKER).read_text())["params"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UsageError(f"--out {out} holds files but no readable {MARKER}, expected a new or empty folder") from None
    expected = {p.path for p in images(held)} | set(ANNOTATIONS[held.layout]) | {MARKER}
    present = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_symlink() or not p.is_dir()}
    if overwrite:
        if foreign := sorted(present - expected):
            raise UsageError(f"--out {out} also holds {foreign[0]}, which this tool did not make; move it away first")
        return False
    if held != params:
        new = dataclasses.asdict(params)
        other = ", ".join(f"{k} {v} (asked {new[k]})" for k, v in dataclasses.asdict(held).items() if v != new[k])
        raise UsageError(f"--out {out} holds a set with {other}; expected another folder or --overwrite")
    if missing := sorted(expected - present):
        raise UsageError(f"--out {out} lacks {missing[0]} of its {len(expected)} files; use --overwrite to redo it")
    return True


def _render_all(root: Path, params: Params, pics: list, workers: int, progress: Progress | None) -> list:
    for folder in sorted({(root / p.path).parent for p in pics}):
        folder.mkdir(parents=True, exist_ok=True)
    tasks = [(params.seed, p.label, p.index, params.size, str(root / p.path)) for p in pics]
    bar = progress.add_task("rendering", total=len(tasks)) if progress else None
    boxes = []

    def collect(results):
        for box in results:
            boxes.append(box)
            if progress:
                progress.advance(bar)

    if workers == 1:
        collect(map(_birds.render_to, tasks))
        return boxes
    # spawn: forking a process that already runs torch or OpenCV threads can hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        collect(pool.map(_birds.render_to, tasks, chunksize=8))
    finally:
        pool.shutdown(cancel_futures=True)
    return boxes


def make(
    out: str | Path, params: Params, workers: int = 1, overwrite: bool = False, progress: Progress | None = None
) -> bool:
    """Writes the set into folder ``out``; returns False if the complete set is there already.

    The files are written to a hidden folder beside ``out`` and renamed at the end, so ``out`` never holds half a set.
    With ``workers`` > 1 the caller's main module must be importable (the usual ``__main__`` guard). Raises UsageError
    if ``out`` holds anything else or ``workers`` is out of range; ``overwrite`` replaces only sets made by this tool.
    """
    _require_in("workers", workers, 1, 256)
    out = Path(out).resolve()
    if _is_complete(out, params, overwrite):
        return False
    pics = images(params)
    out.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    work, old = out.parent / f".{out.name}.{tag}.part", out.parent / f".{out.name}.{tag}.old"
    try:
        work.mkdir()
        boxes = _render_all(work, params, pics, workers, progress)
        {"cub": _write_cub, "cars": _write_cars, "aircraft": _write_aircraft}[params.layout](work, params, pics, boxes)
        classes = [{"name": _birds.class_name(i), **_birds.class_parts(i)} for i in range(params.classes)]
        text = json.dumps({"params": dataclasses.asdict(params), "classes": classes}, indent=1)
        (work / MARKER).write_text(text + "\n")
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(work, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return True


def contact_sheet(params: Params, samples: int = 8) -> Image.Image:
    """A grid with one row per class: its name above the first ``samples`` images of the class."""
    size, strip = params.size, 16
    rows = []
    for label in range(params.classes):
        title = np.full((strip, samples * size, 3), 255, np.uint8)
        text = f"{label + 1:03d} {_birds.class_name(label)}"
        cv2.putText(title, text, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        shown = [Image.open(io.BytesIO(_birds.render(params.seed, label, i, size)[0])) for i in range(samples)]
        rows += [title, np.concatenate([np.asarray(p) for p in shown], axis=1)]
    return Image.fromarray(np.concatenate(rows))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        # argparse would print the whole usage first; one line is easier to find.
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    default = Params()
    p = _Parser(prog="make_mini_fgvc.py", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, help="folder to make (default: data/mini_LAYOUT)")
    p.add_argument("--layout", default=default.layout, choices=LAYOUTS, help="data set whose files are reproduced")
    p.add_argument("--classes", type=int, default=default.classes, help=f"2 to {_birds.MAX_CLASSES} (default 20)")
    p.add_argument("--train-per-class", type=int, default=default.train_per_class, help="images (default 300)")
    p.add_argument("--test-per-class", type=int, default=default.test_per_class, help="images (default 40)")
    p.add_argument("--size", type=int, default=default.size, help="side of the square images in pixels (default 128)")
    p.add_argument("--seed", type=int, default=default.seed, help="same seed, same bytes (default 0)")
    p.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: up to 2)")
    p.add_argument("--overwrite", action="store_true", help="replace a set that this tool made before")
    p.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also write a grid with one row per class")
    p.add_argument("--samples", type=int, default=8, help="images a class on the contact sheet (default 8)")
    return p


def main(argv: list | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 after a one-line error, 130 if interrupted."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True, stderr=True)
    out = args.out or Path("data") / f"mini_{args.layout}"
    try:
        params = Params(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Params) if f.name != "drawing"})
        if args.contact_sheet and args.contact_sheet.suffix.lower() != ".png":
            raise UsageError(f"--contact-sheet is {args.contact_sheet}, expected a name ending in .png")
        _require_in("--samples", args.samples, 1, 1000)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            made = make(out, params, args.workers, args.overwrite, progress)
        count = params.classes * (params.train_per_class + params.test_per_class)
        what = f"{count} images, {params.classes} classes, {params.layout} layout, seed {params.seed}"
        print(f"{out}: made {what}" if made else f"{out}: already complete ({what}), nothing to do")
        if args.contact_sheet:
            args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(params, args.samples).save(args.contact_sheet)
            print(f"{args.contact_sheet}: contact sheet, {params.classes} classes x {args.samples} images")
    except (UsageError, OSError, ImportError) as error:
        where = f"--out {out}: " if isinstance(error, OSError) else ""
        print(f"make_mini_fgvc.py: error: {where}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_mini_fgvc.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
