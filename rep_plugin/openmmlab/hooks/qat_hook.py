"""QATHook: quantisation-aware training of a merged network, and the int8 file at its end."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.runner import Runner
from torch import Tensor, nn

from rep_plugin.arguments import In, Name, NotNegative, OneOf, checked
from rep_plugin.errors import HookError
from rep_plugin.export.fake_quantize import Averaging, FakeQuantization
from rep_plugin.export.int8 import LEAST, int8_images
from rep_plugin.export.runtimes import RUNTIMES
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.report import Report
from rep_plugin.openmmlab.export import write_onnx
from rep_plugin.openmmlab.hooks.base_pruning_hook import PruningHook
from rep_plugin.openmmlab.hooks.linearize_hook import LinearizeHook
from rep_plugin.openmmlab.hooks.reparam_hook import ReparamHook
from rep_plugin.openmmlab.hooks.runner_utils import (
    check_out_dir,
    ema_models,
    evaluate,
    final_model,
    format_metrics,
    kept_random_state,
    plain_model,
    rehearsal,
    training_batch,
    was_over,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.openmmlab.hooks.stateful_hook import StatefulHook, parse_kept
from rep_plugin.openmmlab.load import take_batches
from rep_plugin.openmmlab.onnx_classifier import OnnxClassifier
from rep_plugin.registry import HOOKS
from rep_plugin.reparam.merge_blocks import find_mergeable

FILE = "int8.onnx"
KEPT = {"ranges": dict[str, tuple[float, float]]}
QUICK = dict(methods=["MinMax"], layers=False, rounds=0, min_agreement=0.0)  # of a rehearsal


@checked
@HOOKS.register_module()
class QATHook(StatefulHook):
    """Quantisation-aware training (Jacob et al., CVPR 2018) of a merged network, and the int8 file at its end.

    In every forward, of validation too, convolutions and linear layers read maps and weights that are rounded to 8 bits;
    gradients pass. A map has one scale, weights one for each channel. Ranges of maps are moving averages of the smallest and
    largest values of each batch, and stay from ``freeze`` on. Modules and keys of the network stay stock; the
    ranges are in the meta data of checkpoints, so that resuming goes on exactly.

    After training ``int8.onnx`` and its report, ``int8.onnx.json``, are written as :func:`rep_plugin.export_int8` does, by
    validation images, from the EMA weights where there are. The log has the metrics of validation with that file.

    Start from what merging wrote (``load_from="deploy.pth"``), with a small learning rate: a tenth of the training's or less.

    Args:
        freeze: Epochs after which the ranges stay, fractions too; default: half of the training.
        by_epoch: False: ``freeze`` counts iterations.
        averaging: Share of the newest batch in a range, in (0, 1].
        per_channel: Weights have a scale for each channel; else one for a layer.
        images: Of validation, that calibrate the file and judge it, at most.
        runtime: Where the file is judged: ``onnxruntime`` or ``openvino``.
        keep_float: As :func:`rep_plugin.export_int8` has it.
        min_agreement: As there.
        layers: As there; False saves a run of the quantiser for each layer.
        out_dir: Folder of the files; default: the work directory.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: Before training: branches that are not merged, nothing to quantise, another hook that changes the network,
            or a network that cannot be exported.
        EquivalenceError: After training: the file agrees less than ``min_agreement`` with float.

    Example:
        >>> load_from, custom_hooks = "deploy.pth", [dict(type="rep_plugin.QATHook")]
    """

    meta_key = "rep_qat"
    priority = "VERY_LOW"  # after the last checkpoint

    def __init__(
        self,
        freeze: NotNegative | None = None,
        by_epoch: bool = True,
        averaging: Averaging = 0.01,
        per_channel: bool = True,
        images: Annotated[int, In(f"[{LEAST}, 1000000]")] = 256,
        runtime: Annotated[str, OneOf(RUNTIMES)] = "onnxruntime",
        keep_float: Annotated[int, In("[0, 10000]")] = 0,
        min_agreement: Annotated[float, In("[0, 1]")] = 0.9,
        layers: bool = True,
        out_dir: Name | None = None,
    ):
        self.schedule = Schedule(0, freeze, by_epoch=by_epoch)
        self.averaging, self.per_channel, self.out_dir = averaging, per_channel, out_dir
        self.images = images
        self.options = dict(runtime=runtime, keep_float=keep_float, min_agreement=min_agreement, layers=layers)
        self._quantization: FakeQuantization | None = None
        self._kept: dict[str, tuple[float, float]] = {}
        self._begun = self._frozen_at = 0

    def state(self) -> str | None:
        ranges = self._kept if self._quantization is None else self._quantization.ranges
        return json.dumps(dict(ranges=ranges)) if ranges else None

    def load_state(self, state: str) -> None:
        self._kept = parse_kept(state, self.meta_key, KEPT)["ranges"]

    def before_train(self, runner: Runner) -> None:
        self._begun = runner.iter
        limit, unit = self.schedule.length(runner, "QATHook")
        if self.schedule.end is not None and self.schedule.end > limit:
            raise HookError(f"QATHook.freeze (={self.schedule.end:g}) must be <= the training's {limit} {unit}")
        whole = self.schedule.in_iterations(runner, "QATHook").end
        self._frozen_at = runner.max_iters // 2 if whole is None else whole
        check_out_dir(runner, self.out_dir)
        model = plain_model(runner)
        self._refuse(runner, model)
        with rehearsal("QATHook"):
            self._rehearse(runner, copy_model(model))
        self._quantization = FakeQuantization(model, self.per_channel, self.averaging)
        self._quantization.ranges = self._kept
        self._quantization.attach(model, *(average.module for average in ema_models(runner)))

    def _refuse(self, runner: Runner, model: nn.Module) -> None:
        """Raise HookError for what cannot be quantised in training."""
        rivals = (PruningHook, LinearizeHook, ReparamHook)
        rival = next((type(hook).__name__ for hook in runner.hooks if isinstance(hook, rivals)), None)
        if rival:
            raise HookError(f"QATHook cannot run with {rival}: train what that hook writes in a run of its own")
        if runner.cfg.get("compile"):
            raise HookError("QATHook rounds in the forward as it is written: set compile=False")
        if name := next((name for name, module in model.named_modules() if getattr(module, "with_cp", False)), None):
            raise HookError(
                f"QATHook does not see what is computed again in the backward: set with_cp=False of {name!r}"
            )
        merging = copy_model(model)
        merging.eval()  # not chained: mmpretrain's return None
        if left := find_mergeable(merging):
            raise HookError(
                f"QATHook: {len(left)} modules still have the branches of training, first {left[0]!r}: merge first "
                "(rep-plugin reparameterize), and train deploy.py from deploy.pth"
            )

    def _rehearse(self, runner: Runner, model: nn.Module) -> None:
        """A step and the export, on a copy: what cannot be done shall be known before the training."""
        model.eval()
        quantization = FakeQuantization(model)
        quantization.attach(model)
        with torch.no_grad():
            model(**training_batch(runner), mode="loss")
        quantization.detach()
        if not quantization.layers:
            raise HookError(
                f"QATHook: {type(model).__name__} calls no convolution or linear layer: nothing to quantise"
            )
        if is_main_process():
            with tempfile.TemporaryDirectory() as folder:
                options = self.options | QUICK | dict(keep_float=0)
                self._export(runner, model, Path(folder) / FILE, LEAST, **options)

    def _export(self, runner: Runner, model: nn.Module, path: Path, count: int, **options) -> Report:
        model.cpu().eval()
        loader = (runner.val_loop or runner.train_loop).dataloader
        with kept_random_state():
            batches = take_batches(model, loader, count)
        images, labels = zip(*batches)
        truth: Tensor | None = None if any(some is None for some in labels) else torch.cat(labels)
        meta = getattr(loader.dataset, "metainfo", None)
        return write_onnx(model, runner.cfg, path, torch.cat(images), meta, write=int8_images, labels=truth, **options)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self._quantization.observing = runner.iter < self._frozen_at

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if self._quantization.observing and get_world_size() > 1:  # each process has seen other images
            names = list(self._quantization.ranges)
            ranges = torch.tensor([self._quantization.ranges[name] for name in names])
            all_reduce(ranges, "mean")
            self._quantization.ranges = dict(zip(names, ranges.tolist()))

    def after_train(self, runner: Runner) -> None:
        self._quantization.detach()
        if not is_main_process():
            return
        path = Path(self.out_dir or runner.work_dir) / FILE
        if was_over(runner, self._begun, path):
            runner.logger.info("QATHook: training was over before, its int8 file stays as it is")
            return
        model = copy_model(final_model(runner))
        report = self._export(runner, model, path, self.images, with_report=True, **self.options)
        runner.logger.info(f"int8 file written to {path}\n{report}")
        is_classifier = hasattr(getattr(model, "head", model), "_get_predictions")
        if is_classifier and get_world_size() == 1 and runner.val_loop is not None:
            exported = OnnxClassifier(
                path, runner.cfg.model, self.options["runtime"], runner.cfg.get("data_preprocessor")
            )
            runner.logger.info(f"int8 file in validation: {format_metrics(evaluate(runner, exported))}")
