#!/usr/bin/env python
"""Bilinear pooling against global average pooling on the rendered birds: same backbone, schedule and seeds.

As published, both start from a backbone that was trained on other images: here with average pooling on 40 other rendered
species. Every run is `rep-plugin train configs/bcnn/bcnn_rep_mbv2_mini_cub.py` with options. The arms differ in neck and head
(and its learning rate) alone.

    python benchmarks/bilinear_against_gap.py                  # about an hour on two cores
    python benchmarks/bilinear_against_gap.py --from-scratch   # without the first step
"""

import argparse
import subprocess
import sys
from pathlib import Path

from training_runs import ROOT, Job, add_arguments, folder_of, print_scores, run, run_all

from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.checkpoints.safe_load import load_checkpoint_file

BILINEAR, GAP = ROOT / "configs/bcnn/bcnn_rep_mbv2_mini_cub.py", ROOT / "benchmarks/configs/gap_rep_mbv2_mini_cub.py"
CONTENDERS = {
    "bilinear": (BILINEAR, []),
    "global average": (GAP, []),
    "global average, head lr x 5": (GAP, ["optim_wrapper.paramwise_cfg.custom_keys.fc.lr_mult=5.0"]),
}
CLASSES, OTHER_CLASSES, OTHER_SEED = 20, 40, 7


def schedule(epochs: int) -> list[str]:
    """Options of a run of so many epochs."""
    warm_up = 2
    return [
        f"train_cfg.max_epochs={epochs}",
        f"train_cfg.val_interval={epochs}",
        f"default_hooks.checkpoint.interval={epochs}",
        f"param_scheduler.1.T_max={epochs - warm_up}",
        f"param_scheduler.1.end={epochs}",
        "default_hooks.logger.interval=10",
    ]


def render(birds: Path, classes: int, seed: int) -> list[str]:
    """Render 60 images a class to train on and 20 to test on, unless done before; return the options that read them."""
    tool = [sys.executable, str(ROOT / "tools/dataset_converters/make_mini_fgvc.py"), "--out", str(birds)]
    counts = ["--classes", str(classes), "--train-per-class", "60", "--test-per-class", "20"]
    subprocess.run([*tool, *counts, "--seed", str(seed)], check=True)
    return [f"{name}_dataloader.dataset.data_root={birds}" for name in ("train", "val", "test")]


def train_backbone(folder: Path, epochs: int) -> Path:
    """Render other species, train the backbone on them with average pooling, return its weights."""
    weights = folder / "backbone.pth"
    if weights.is_file():
        return weights
    loaders = render(folder / "other_birds", OTHER_CLASSES, OTHER_SEED)
    classes = [f"{part}.num_classes={OTHER_CLASSES}" for part in ("model.head", "data_preprocessor")]
    options = [*schedule(epochs), *loaders, *classes, "optim_wrapper.optimizer.lr=0.1", "randomness.seed=0"]
    job = Job("backbone", 0, GAP, options, f"other_e{epochs}")
    print("top-1 of the backbone on the other species: {top1:.2f} %".format(**run(job, folder)))
    state = load_checkpoint_file(folder_of(job, folder) / f"epoch_{epochs}.pth")["state_dict"]
    state = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    save_checkpoint_file({"state_dict": state}, weights)
    return weights


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--from-scratch", action="store_true", help="start without trained weights")
    add_arguments(parser, "bench_bilinear_against_gap")
    args = parser.parse_args()
    loaders = render(Path(args.work_dir) / "birds", CLASSES, seed=0)
    options = [*schedule(args.epochs), *loaders, *args.cfg_options]
    label = f"e{args.epochs}"
    if args.from_scratch:
        label += "_scratch"
    else:
        options.append(f"load_from={train_backbone(Path(args.work_dir), args.epochs)}")
    jobs = [
        Job(name, seed, CONTENDERS[name][0], [*options, *CONTENDERS[name][1], f"randomness.seed={seed}"], label)
        for seed in range(args.seeds)
        for name in args.contenders
    ]
    results = run_all(jobs, Path(args.work_dir), args.workers)
    start = "from scratch" if args.from_scratch else "from a backbone trained on other species"
    title = f"rendered birds, 20 classes, {start}, {args.epochs} epochs, {args.seeds} seeds"
    print_scores(title, results, "global average")


if __name__ == "__main__":
    main()
