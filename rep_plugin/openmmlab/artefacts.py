"""Deployed models as stock code loads them: ``deploy.pth`` and ``deploy.py``, written together or not at all."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from rep_plugin.blocks.annealed import annealed_modules
from rep_plugin.checkpoints.files import save_checkpoint_file, write_atomic, write_together
from rep_plugin.checkpoints.strict import describe_mismatch
from rep_plugin.measure.plots import draw_widths
from rep_plugin.measure.report import Report
from rep_plugin.openmmlab.configs import deploy_config, plain_data, pruned_config
from rep_plugin.openmmlab.load import build_model, check_rebuilt
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan
from rep_plugin.reparam import reparameterize
from rep_plugin.version import __version__


def write_deployed(
    model: nn.Module,
    cfg: Config,
    out_dir: str | os.PathLike,
    inputs: Tensor | None = None,
    dataset_meta: dict | None = None,
) -> Report:
    """Merge a copy of a trained model, prove it, and write ``deploy.pth``, ``deploy.py`` and ``deploy.json`` (the report).

    ``model`` is what ``cfg.model`` builds, in any mode; ``inputs`` are preprocessed pictures (N, C, H, W) for the proof
    beside random ones. The files are what ``init_model`` of ``mmpretrain.apis`` and ``mmseg.apis``, ``init_detector`` of
    ``mmdet.apis`` and the stock ``tools/test.py`` load. Raises what :func:`rep_plugin.reparameterize` raises, or OSError
    where a file cannot be written; older files then stay.
    """
    out_dir = Path(out_dir)
    deployed = deploy_config(cfg)
    source = copy.deepcopy(model)
    source.eval()
    merged, report = reparameterize(source, inputs, inplace=True, fold_bn=False)
    merged.cpu()
    if describe_mismatch(build_model(deployed).state_dict(), merged.state_dict()):
        deployed = deploy_config(
            cfg, as_stock=False
        )  # biases that the stock network has not: no batch norm took them up
    example = inputs if inputs is not None else torch.zeros(report.input_shape)
    check_rebuilt(deployed, merged, example)

    meta = file_meta(merged, dataset_meta, report.notes)
    pretty = deployed.pretty_text.encode()
    write_together(
        out_dir,
        {
            "deploy.pth": lambda path: save_checkpoint_file({"meta": meta, "state_dict": merged.state_dict()}, path),
            "deploy.py": lambda path: write_atomic(path, lambda file: file.write(pretty)),
            "deploy.json": lambda path: write_atomic(path, lambda file: file.write(report.to_json().encode())),
        },
    )
    return report


def file_meta(model: nn.Module, dataset_meta: dict | None, notes: list[str]) -> dict:
    """Return the meta data of an artefact's file; class names that cannot be the classifier's are left out, with a note."""
    told = plain_data(dataset_meta or {})
    if "classes" in told and (misfit := misfit_of(told["classes"], model)):
        del told["classes"]
        notes.append(misfit)
    return {"rep_plugin_version": __version__, "dataset_meta": told}


def misfit_of(class_names: Sequence[str] | None, model: nn.Module) -> str:
    """Return why the names of a data set are not those of a classifier's outputs; empty where they may be."""
    outputs = getattr(getattr(model, "head", None), "num_classes", None)
    if not class_names or outputs in (None, len(class_names)):
        return ""
    return (
        f"class names left out: the data set has {len(class_names)}, the head {outputs} (give the data set classes=...)"
    )


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
