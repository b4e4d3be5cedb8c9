"""Pruned models as stock code loads them: ``pruned.pth`` and ``pruned.py``, the plan, the report and a picture of both."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from rep_plugin.blocks.annealed import annealed_modules
from rep_plugin.checkpoint import save_checkpoint_file, write_atomic, write_together
from rep_plugin.mm_artefact import NARROWING_HOOKS, check_rebuilt, file_meta, finish_
from rep_plugin.pictures import draw_widths
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan


def pruned_config(cfg: Config, plan: PrunePlan, linear: bool = True) -> Config:
    """Return a copy of a config whose model is the pruned one, with its structure inside: the same file in all else.

    ``linear``: no anneal is under way, so that ``LinearizeHook`` has nothing to do.
    """
    cfg = copy.deepcopy(cfg)
    # As text, and without the scores: mmengine takes seconds to print thousands of indented numbers.
    text = json.dumps(asdict(replace(plan, scores={})), separators=(",", ":"))
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=text, backbone=dict())
    finish_(cfg, [name for name in NARROWING_HOOKS if linear or name != "LinearizeHook"])
    return cfg


def write_pruned(
    model: nn.Module,
    cfg: Config,
    plan: PrunePlan,
    out_dir: str | os.PathLike,
    inputs: Tensor | None = None,
    dataset_meta: dict | None = None,
) -> PruneReport:
    """Prune a copy of a model by ``plan``, prove it, and write ``pruned.pth pruned.py pruned.plan.json pruned.json .png``.

    ``model`` is what ``cfg.model`` builds; ``inputs`` are preprocessed pictures (N, C, H, W) for the proof. The first two
    files are what stock ``init_model``, ``init_detector`` and ``tools/test.py`` load, and ``load_from`` for fine-tuning;
    pruning them again, or merging them, nests in the config. Raises what :func:`rep_plugin.apply_plan` raises, or OSError
    where a file cannot be written; older files then stay.
    """
    pruned = copy.deepcopy(model)
    pruned.eval()
    report = apply_plan(pruned, plan, example_input=inputs)
    write_pruned_model(pruned, cfg, plan, report, out_dir, inputs, dataset_meta)
    return report


def write_pruned_model(
    pruned: nn.Module,
    cfg: Config,
    plan: PrunePlan,
    report: PruneReport,
    out_dir: str | os.PathLike,
    inputs: Tensor | None = None,
    dataset_meta: dict | None = None,
    more_texts: Mapping[str, str] | None = None,
) -> None:
    """Write the files of :func:`write_pruned` for a model that is what ``plan`` makes of ``cfg.model``.

    It is moved to the CPU and put in eval mode. ``more_texts``: file name -> text, written along.
    """
    written = pruned_config(cfg, plan, all(part.alpha == 1 for part in annealed_modules(pruned)))
    pruned.eval()
    pruned.cpu()
    check_rebuilt(written, pruned, inputs if inputs is not None else torch.zeros(1, *plan.input_shape[1:]))

    meta = file_meta(pruned, dataset_meta, report.notes)
    texts = {
        "pruned.py": written.pretty_text,
        "pruned.plan.json": plan.to_json() + "\n",
        "pruned.json": report.to_json() + "\n",
        **(more_texts or {}),
    }
    files = {"pruned.pth": lambda path: save_checkpoint_file({"meta": meta, "state_dict": pruned.state_dict()}, path)}
    for name, text in texts.items():
        files[name] = lambda path, text=text: write_atomic(path, lambda file: file.write(text.encode()))
    title = f"{plan.why}: {report.params_after:,} of {report.params_before:,} parameters"
    files["pruned.png"] = lambda path: write_atomic(
        path, lambda file: draw_widths(plan.widths, file, title, plan.frozen)
    )
    write_together(Path(out_dir), files)
