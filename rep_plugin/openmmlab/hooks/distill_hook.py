"""DistillHook: a dense model teaches the one in training, by its class probabilities and by where its maps look."""

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rep_plugin.arguments import In, Name, NotNegative, Positive, That, checked
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.checkpoints.tensors import digest_of
from rep_plugin.errors import ArgumentError, HookError, RepPluginError, first_line
from rep_plugin.functional.distillation import attention_distance, soft_divergence
from rep_plugin.history import history_of
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_params
from rep_plugin.openmmlab.base_configs import read_config
from rep_plugin.openmmlab.hooks.prune_hook import PruneHook
from rep_plugin.openmmlab.hooks.runner_utils import (
    as_hook_error,
    check_out_dir,
    final_model,
    plain_model,
    rehearsal,
    training_batch,
)
from rep_plugin.openmmlab.hooks.stateful_hook import StatefulHook
from rep_plugin.openmmlab.load import load_model
from rep_plugin.registry import HOOKS

FILE = "teacher.pth"
# Types by name: what a hook is given is written with the training's config.
Network = Annotated[
    Mapping,
    That(lambda cfg: "model" in cfg or isinstance(cfg.get("type"), str), "a config with a model, or a model's own"),
]


@checked
@HOOKS.register_module()
class DistillHook(StatefulHook):
    """Knowledge distillation (Hinton et al., 2015) in stock training: fine-tuning follows a dense teacher.

    The loss becomes ``(1 - weight) * labels + weight * T^2 * KL(teacher || student) + feature_weight * attention``; the log
    has the terms as ``loss_label``, ``loss_distill`` and ``loss_feature``. ``attention`` compares maps by where their
    energy is (Zagoruyko and Komodakis, ICLR 2017), which needs no projection between wide and narrow maps. Images are
    those that the student gets, after augmentation; any optimizer wrapper, accumulation and DDP stay as they are.

    The teacher is in eval mode, has no gradients, and is in no checkpoint and no optimizer. Without ``teacher`` it is a
    copy of the model (of the EMA weights, where there are) as it is right before a PruneHook with ``begin`` removes its
    first channels; it teaches from then on, and is kept in ``teacher.pth`` for resuming.

    Args:
        teacher: A config (a file, the name of a shipped one, or its data) of any network with the same classes and
            normalisation of images.
        checkpoint: Of the teacher.
        temperature: T of both class probabilities.
        weight: Of the class probabilities, in [0, 1].
        feature_weight: Of the attention.
        features: Modules whose maps (N, C, H, W) are compared, of the same names in both.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: Teacher and training do not fit.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.DistillHook", teacher="dense.py", checkpoint="dense.pth")]
    """

    priority = "HIGH"
    meta_key = "rep_teacher"  # which teacher a checkpoint was trained with

    def __init__(
        self,
        teacher: Name | Network | None = None,
        checkpoint: Name | None = None,
        temperature: Positive = 4.0,
        weight: Annotated[float, In("[0, 1]")] = 0.9,
        feature_weight: NotNegative = 0.0,
        features: Sequence[Name] = ("backbone",),
    ):
        if (teacher is None) != (checkpoint is None):
            raise ArgumentError(
                f"DistillHook takes teacher and checkpoint, or neither, got {teacher!r} and {checkpoint!r}"
            )
        if not weight + feature_weight > 0:
            raise ArgumentError("DistillHook needs weight or feature_weight above 0, got 0 for both")
        if not features:
            raise ArgumentError(f"features must be a list of module names, got {features!r}")
        self.source, self.checkpoint, self.temperature = teacher, checkpoint, temperature
        self.weight, self.feature_weight = weight, feature_weight
        self.features = tuple(features) if feature_weight else ()
        self.teacher: nn.Module | None = None
        self._steps_before, self._digest = 0, None
        self._taps, self._handles = ExitStack(), []

    def before_run(self, runner: Runner) -> None:
        self._steps_before = len(history_of(plain_model(runner)))

    def state(self) -> str | None:
        return self._digest if self.source is None and self.teacher is not None else None

    def load_state(self, state: str) -> None:
        self._digest = state

    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        check_out_dir(runner, None)
        if self.source is not None:
            self._teach(runner, self._from_config(runner, model), str(self.checkpoint))
        elif runner._resume and len(history_of(model)) > self._steps_before:
            self._teach(runner, *self._from_file(runner))
        elif not any(isinstance(hook, PruneHook) and hook.begin is not None for hook in runner.hooks):
            raise HookError(
                "DistillHook without teacher copies the model before PruneHook's first removal, but no PruneHook with begin "
                "is there: give teacher (a config) and checkpoint"
            )
        self._rehearse(runner)
        self._handles = self._attach(model)

    def _rehearse(self, runner: Runner) -> None:
        """The loss of two training images, on a copy: a teacher that does not fit shall be known before the first step."""
        student, teacher = copy_model(plain_model(runner)), self.teacher
        student.eval()
        if teacher is None:
            self.teacher = copy_model(student)
        handles = self._attach(student)
        try:
            with rehearsal("DistillHook"), torch.no_grad():
                student(**training_batch(runner), mode="loss")
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, RepPluginError):
                raise
            raise HookError(f"DistillHook: teacher and model cannot be run together: {first_line(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
            self._taps.close()
            self.teacher = teacher

    def before_removal(self, runner: Runner) -> None:
        """Called by hooks that are about to remove channels from the model in training."""
        if self.teacher is not None:
            return
        teacher = copy_model(final_model(runner))
        state = teacher.state_dict()
        self._digest = digest_of(state)
        if is_main_process():
            content = {"meta": {self.meta_key: self._digest}, "state_dict": state}
            save_checkpoint_file(content, Path(runner.work_dir) / FILE)
        self._teach(runner, teacher, "this training, before the first removal")

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _from_config(self, runner: Runner, student: nn.Module) -> nn.Module:
        try:
            named = isinstance(self.source, str)
            cfg = read_config(self.source) if named else Config(copy.deepcopy(dict(self.source)))
            if "model" not in cfg:
                cfg = Config(dict(model=cfg._cfg_dict, data_preprocessor=runner.cfg.get("data_preprocessor")))
            teacher, _ = load_model(cfg, str(self.checkpoint))
        except (OSError, RepPluginError) as error:
            raise HookError(f"DistillHook: the teacher cannot be loaded: {' '.join(str(error).split())}") from error
        ours, theirs = (_normalisation(model) for model in (student, teacher))
        if ours != theirs:
            raise HookError(f"DistillHook: the teacher sees images with {theirs}, expected the student's {ours}")
        return teacher

    def _from_file(self, runner: Runner) -> tuple[nn.Module, str]:
        folders = (Path(runner.work_dir), Path(str(runner._load_from or "")).parent)
        path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
        if path is None:
            raise HookError(f"DistillHook resumes after a removal and needs {folders[0] / FILE}, which is not there")
        teacher, meta = load_model(runner.cfg, str(path))
        if meta.get(self.meta_key) != self._digest:
            raise HookError(f"DistillHook: {path} is not the teacher that the checkpoint was trained with")
        return teacher, str(path)

    def _teach(self, runner: Runner, teacher: nn.Module, source: str) -> None:
        teacher.eval()  # not chained: mmpretrain's return None
        teacher.requires_grad_(False)
        self.teacher = teacher.to(next(plain_model(runner).parameters()).device)
        for name in self.features:
            _module(self.teacher, name, "teacher")
        runner.logger.info(f"DistillHook: the teacher has {count_params(teacher):,} parameters, from {source}")

    def _attach(self, student: nn.Module) -> list[RemovableHandle]:
        """Hooks on the model itself act inside DDP's forward too; copies of the model take them along, and are not meant."""
        head = type(getattr(student, "head", None))
        if any(base.__name__ == "MultiLabelClsHead" for base in head.__mro__):  # mmpretrain's, which may be absent
            raise HookError(f"DistillHook softens one label an image, got a {head.__name__}")
        logits = "head" if hasattr(student, "head") else "model"  # of a stock network, of a wrapped timm network
        names = (logits, *self.features)
        for name in names:
            _module(student, name, "model")
        outputs: dict[str, object] = {}
        own = weakref.ref(student)  # copies of the student, as the teacher, carry the hooks and are left alone

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._taps.close()  # of a pass that did not come to its end
            if module is own() and self.teacher is not None and _mode(args, kwargs) == "loss":
                outputs.clear()
                outputs.update(inputs=kwargs["inputs"] if "inputs" in kwargs else args[0])
                self._taps.enter_context(_outputs(module, names, outputs))

        def after(module: nn.Module, args: tuple, kwargs: dict, losses: dict) -> dict | None:
            if module is not own() or "inputs" not in outputs:
                return None
            self._taps.close()
            if logits not in outputs:
                raise HookError(f"DistillHook: {type(module).__name__}'s loss does not call its {logits!r}")
            mixed = self._mix(outputs, logits, losses)
            outputs.clear()
            return mixed

        return [
            student.register_forward_pre_hook(before, with_kwargs=True),
            student.register_forward_hook(after, with_kwargs=True),
        ]

    def _mix(self, outputs: dict, logits: str, losses: dict) -> dict:
        taught: dict[str, object] = {}
        with torch.no_grad(), _outputs(self.teacher, self.features, taught):
            answer = self.teacher(outputs["inputs"], mode="tensor")
        mixed = {}
        for name, value in losses.items():
            if "loss" in name:  # of these mmengine logs the sum as ``loss``, unless one of them has that very name
                name, share = "loss_label" if name == "loss" else name, 1 - self.weight
                value = [one * share for one in value] if isinstance(value, list) else value * share
            mixed[name] = value
        with as_hook_error("DistillHook"):
            if self.weight:
                ours, theirs = _logits(outputs[logits], "student"), _logits(answer, "teacher")
                mixed["loss_distill"] = self.weight * soft_divergence(ours, theirs, self.temperature)
            if self.feature_weight:
                pairs = [pair for name in self.features for pair in _pairs(name, outputs.get(name), taught.get(name))]
                distance = sum(attention_distance(*pair) for pair in pairs) / len(pairs)
                mixed["loss_feature"] = self.feature_weight * distance
        return mixed


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str], into: dict[str, object]) -> Iterator[None]:
    """Keep what the modules of these names put out while the context lasts."""
    with ExitStack() as stack:
        for name in names:
            keep = model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: into.__setitem__(name, out)
            )
            stack.callback(keep.remove)
        yield


def _mode(args: tuple, kwargs: dict) -> str:
    return kwargs.get("mode", args[2] if len(args) > 2 else "tensor")


def _module(model: nn.Module, name: str, who: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise HookError(f"DistillHook: the {who}, {type(model).__name__}, has no module {name!r}") from None


def _logits(out: object, who: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise ArgumentError(f"the {who} gives {type(out).__name__}, expected logits (N, classes)")
    return out


def _pairs(name: str, ours: object, theirs: object) -> list[tuple[Tensor, Tensor]]:
    """The maps of one module, student's and teacher's: both one, or equally many."""
    pair = [list(maps) if isinstance(maps, (tuple, list)) else [maps] for maps in (ours, theirs)]
    if any(not isinstance(one, Tensor) for maps in pair for one in maps) or len(pair[0]) != len(pair[1]):
        described = (f"{len(maps)} of {type(maps[0]).__name__}" for maps in pair)
        raise ArgumentError(
            "{!r} must give equally many maps in student and teacher, got {} and {}".format(name, *described)
        )
    return list(zip(*pair))


def _normalisation(model: nn.Module) -> str:
    part = getattr(model, "data_preprocessor", None)
    values = {}
    for name in ("mean", "std"):
        value = getattr(part, name, None)
        values[name] = None if value is None else [round(v, 3) for v in value.flatten().tolist()]
    return "mean {mean}, std {std}".format(**values) + f", to_rgb {getattr(part, 'to_rgb', False)}"
