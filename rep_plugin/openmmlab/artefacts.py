"""Deployed and pruned models as stock code loads them: a checkpoint and a config, written together or not at all."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from mmengine.config import Config
from torch import Tensor, nn

from rep_plugin.arguments import Dims, checked
from rep_plugin.blocks.annealed import annealed_modules
from rep_plugin.checkpoints.files import save_checkpoint_file, write_atomic, write_together
from rep_plugin.checkpoints.strict import describe_mismatch
from rep_plugin.errors import ArgumentError
from rep_plugin.history import history_of
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import require_numbers
from rep_plugin.measure.plots import draw_widths
from rep_plugin.measure.report import Report
from rep_plugin.openmmlab.configs import (
    deploy_config,
    expanded_config,
    fine_tune_,
    linearized_config,
    own_data_,
    plain_data,
    pruned_config,
)
from rep_plugin.openmmlab.load import build_model, check_rebuilt
from rep_plugin.openmmlab.origin import MADE
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan
from rep_plugin.reparam import expand, reparameterize
from rep_plugin.version import __version__

Images = Annotated[Tensor, Dims("(N, C, H, W)")]


@checked
def write_deployed(
    model: nn.Module,
    cfg: Config,
    out_dir: str | os.PathLike,
    inputs: Images | None = None,
    dataset_meta: dict | None = None,
    fold_bn: bool = False,
) -> Report:
    """Merge a copy of a trained model, prove it, and write ``deploy.pth deploy.py`` and the report, ``deploy.json .html``.

    The files are what ``init_model`` of ``mmpretrain.apis`` and ``mmseg.apis``, ``init_detector`` of ``mmdet.apis`` and the
    stock ``tools/test.py`` load. Where anything fails, older files stay.

    Args:
        model: what ``cfg.model`` builds, in any mode.
        cfg: the config it was trained with.
        out_dir: folder of the files.
        inputs: preprocessed images (N, C, H, W) for the proof, beside random ones.
        dataset_meta: meta data of the data set; class names go into the file.
        fold_bn: fold the network's own BNs as well; ``deploy.py`` is then no stock config, but merges when it builds.

    Returns:
        The report.

    Raises:
        EquivalenceError: the merged model computes something else, and what else
            :func:`rep_plugin.reparameterize` raises.
        OSError: a file cannot be written.

    Example:
        >>> from mmengine.config import Config
        >>> from rep_plugin.openmmlab import build_model, write_deployed
        >>> net = dict(type="ImageClassifier", backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1))
        >>> cfg = Config(dict(default_scope="mmpretrain", model=net))
        >>> report = write_deployed(build_model(cfg), cfg, "out")
        >>> len(report.blocks), Config.fromfile("out/deploy.py").model.backbone.deploy
        (19, True)
    """
    if inputs is not None:
        require_numbers("inputs", inputs)
    merged, deployed, report = deployed_form(model, cfg, inputs, fold_bn=fold_bn)
    check_rebuilt(deployed, merged, inputs if inputs is not None else torch.zeros(report.input_shape))

    meta = _file_meta("deployed", merged, dataset_meta, report.notes)
    own_data_(deployed, meta["dataset_meta"].get("classes"))
    texts = {"deploy.py": deployed.pretty_text, "deploy.json": report.to_json(), "deploy.html": report.to_html()}
    write_together(Path(out_dir), _writers("deploy.pth", merged, meta, texts))
    return report


def deployed_form(
    model: nn.Module, cfg: Config, inputs: Tensor | None = None, verify: bool = True, fold_bn: bool = False
) -> tuple[nn.Module, Config, Report]:
    """Merge a copy of a model, and find the config that builds the result.

    Args:
        model: what ``cfg.model`` builds, in any mode.
        cfg: the config it was trained with.
        inputs: preprocessed images (N, C, H, W) for the proof.
        verify: prove the merge.
        fold_bn: fold the network's own BNs as well.

    Returns:
        The merged model on the CPU, its config, and the report.

    Raises:
        RepPluginError: what :func:`rep_plugin.reparameterize` raises.
        ArgumentError: there is no config for the result.
    """
    cfg = linearized_config(cfg, history_of(model))
    deployed = deploy_config(cfg, as_stock=not fold_bn)
    source = copy_model(model)
    source.eval()
    merged, report = reparameterize(source, inputs, inplace=True, fold_bn=fold_bn, verify=verify)
    merged.cpu()
    if fold_bn:
        deployed.model.fold_bn = True
    elif describe_mismatch(build_model(deployed), merged.state_dict()):
        # The merge left biases that the stock network has not, and no batch norm took them up.
        deployed = deploy_config(cfg, as_stock=False)
    return merged, deployed, report


@checked
def write_pruned(
    model: nn.Module,
    cfg: Config,
    plan: PrunePlan,
    out_dir: str | os.PathLike,
    inputs: Images | None = None,
    dataset_meta: dict | None = None,
) -> PruneReport:
    """Prune a copy of a model by a plan, prove it, and write ``pruned.pth .py .plan.json .json .html .png``.

    The first two files are what stock ``init_model``, ``init_detector`` and ``tools/test.py`` load, and ``load_from`` for
    fine-tuning; pruning them again, or merging them, nests in the config. Where anything fails, older files stay.

    Args:
        model: what ``cfg.model`` builds, in any mode.
        cfg: the config it was trained with.
        plan: what to remove.
        out_dir: folder of the files.
        inputs: preprocessed images (N, C, H, W) for the proof, beside random ones.
        dataset_meta: meta data of the data set; class names go into the file.

    Returns:
        The report.

    Raises:
        EquivalenceError: the pruned model computes something else than the masked one, and what else
            :func:`rep_plugin.apply_plan` raises.
        OSError: a file cannot be written.

    Example:
        >>> from mmengine.config import Config
        >>> from rep_plugin import plan_pruning
        >>> from rep_plugin.openmmlab import build_model, write_pruned
        >>> net = dict(type="ImageClassifier", backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1))
        >>> cfg = Config(dict(default_scope="mmpretrain", model=net))
        >>> model = build_model(cfg)
        >>> report = write_pruned(model, cfg, plan_pruning(model, (1, 3, 32, 32), "l1", 0.3), "out")
        >>> report.params_after < report.params_before
        True
    """
    pruned = copy_model(model)
    pruned.eval()
    report = apply_plan(pruned, plan, example_input=inputs)
    write_pruned_model(pruned, cfg, plan, report, out_dir, inputs, dataset_meta)
    return report


def write_expanded(
    model: nn.Module,
    cfg: Config,
    block: str,
    where: str | Sequence[str] | None,
    out_dir: str | os.PathLike,
) -> Report:
    """Expand a copy of a model, prove it, and write ``expanded.pth``, ``expanded.py`` and ``expanded.json`` (the report).

    ``expanded.py`` is the config with ``rep_plugin.Expanded`` around its model. It loads ``expanded.pth`` beside it, and
    trains on as before. Where anything fails, older files stay.

    Args:
        model: what ``cfg.model`` builds, with its weights.
        cfg: the config it was trained with.
        block: as in :func:`rep_plugin.expand`.
        where: as in :func:`rep_plugin.expand`.
        out_dir: folder of the files.

    Returns:
        The report.

    Raises:
        ArgumentError: there is nothing to expand.
        OSError: a file cannot be written.
    """
    expanded, report = expand(model, block, where=where)
    written = expanded_config(cfg, block, where)
    check_rebuilt(written, expanded.eval() or expanded, torch.zeros(report.input_shape))
    written.load_from = "{{ fileDirname }}/expanded.pth"
    texts = {"expanded.py": written.pretty_text, "expanded.json": report.to_json() + "\n"}
    meta = _file_meta("expanded", expanded, None, report.notes)
    write_together(Path(out_dir), _writers("expanded.pth", expanded, meta, texts))
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
    """Write the files of :func:`write_pruned` for a model that is pruned already.

    Args:
        pruned: what ``plan`` makes of ``cfg.model``; it is moved to the CPU and put in eval mode.
        cfg: the config of the model before.
        plan: what was removed.
        report: what :func:`rep_plugin.apply_plan` returned.
        out_dir: folder of the files.
        inputs: preprocessed images (N, C, H, W) to compare on; None for zeros.
        dataset_meta: meta data of the data set.
        more_texts: file name -> text, written along.
    """
    written = check_pruned_form(pruned, cfg, plan, inputs)
    meta = _file_meta("pruned", pruned, dataset_meta, report.notes)
    own_data_(written, meta["dataset_meta"].get("classes"))
    schedule = fine_tune_(written, "pruned.pth")
    head = f"# A pruned network. Training this file fine-tunes pruned.pth beside it.\n# {schedule}\n"
    texts = {
        "pruned.py": head + written.pretty_text,
        "pruned.plan.json": plan.to_json() + "\n",
        "pruned.json": report.to_json() + "\n",
        "pruned.html": report.to_html(),
        **(more_texts or {}),
    }
    files = _writers("pruned.pth", pruned, meta, texts)
    title = f"{plan.why}: {report.params_after:,} of {report.params_before:,} parameters"
    files["pruned.png"] = lambda path: write_atomic(
        path, lambda file: draw_widths(plan.widths, file, title, plan.frozen)
    )
    write_together(Path(out_dir), files)


def check_pruned_form(pruned: nn.Module, cfg: Config, plan: PrunePlan, inputs: Tensor | None = None) -> Config:
    """Return the config of a pruned model, once what it builds is proven to be that model.

    Args:
        pruned: what ``plan`` makes of ``cfg.model``; it is moved to the CPU and put in eval mode.
        cfg: the config of the model before.
        plan: what was removed.
        inputs: preprocessed images (N, C, H, W) to compare on; None for zeros.

    Returns:
        The config.

    Raises:
        CheckpointMismatchError: the weights do not fit.
        EquivalenceError: the output differs.
    """
    if "model" not in cfg:
        raise ArgumentError("the config has no model: what is written could not be built from it")
    written = pruned_config(cfg, plan, all(part.alpha == 1 for part in annealed_modules(pruned)))
    pruned.eval()
    pruned.cpu()
    check_rebuilt(written, pruned, inputs if inputs is not None else torch.zeros(1, *plan.input_shape[1:]))
    return written


def _writers(name: str, model: nn.Module, meta: dict, texts: Mapping[str, str]) -> dict[str, Callable[[Path], None]]:
    """File name -> what writes it, for a checkpoint and the texts beside it."""
    files = {name: lambda path: save_checkpoint_file({"meta": meta, "state_dict": model.state_dict()}, path)}
    for file_name, text in texts.items():
        files[file_name] = lambda path, text=text: write_atomic(path, lambda file: file.write(text.encode()))
    return files


def _file_meta(made: str, model: nn.Module, dataset_meta: dict | None, notes: list[str]) -> dict:
    """The meta data of an artefact's file; class names that cannot be the classifier's are left out, with a note."""
    meta = plain_data(dataset_meta or {})
    if reason := why_not_class_names(meta.get("classes"), model):
        del meta["classes"]
        notes.append(reason)
    return {"rep_plugin_version": __version__, MADE: made, "dataset_meta": meta}


def why_not_class_names(names: Sequence[str] | None, model: nn.Module) -> str | None:
    """Return why the class names of a data set are not those of a classifier's outputs.

    Args:
        names: the names, if any.
        model: a classifier, or any other model.

    Returns:
        The reason, or None where they may be.
    """
    outputs = getattr(getattr(model, "head", None), "num_classes", None)
    if not names or outputs in (None, len(names)):
        return None
    return f"class names left out: the data set has {len(names)}, the head {outputs} (give the data set classes=...)"
