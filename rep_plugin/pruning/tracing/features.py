"""What timm's networks say of their own widths: ``feature_info`` and ``num_features``, which follow the channels."""

from collections.abc import Callable, Mapping
from functools import partial, wraps

from torch import Tensor, nn

from rep_plugin.pruning.tracing.graph import tensors_in
from rep_plugin.pruning.tracing.recorder import Recorder

NUM_FEATURES = "num_features"


def entries_of(module: nn.Module) -> list[dict]:
    """Return the entries of a module's own ``feature_info``, none where it has no such thing."""
    info = module.__dict__.get("feature_info")
    info = getattr(info, "info", info)
    return list(info) if isinstance(info, (list, tuple)) and all(isinstance(one, dict) for one in info) else []


def _module_of(owner: nn.Module, name: str) -> nn.Module | None:
    """The module that an entry names: feature extractors hold it under a prefix, or flattened."""
    modules = dict(owner.named_modules())
    names = (name, f"body.{name}", f"model.{name}", name.replace(".", "_", 1))
    return next((modules[one] for one in names if one in modules), None)


class FeatureWatch:
    """Sees which channels the features are while a model is traced.

    Args:
        model: the copy that is traced.
        recorder: of the trace.
    """

    def __init__(self, model: nn.Module, recorder: Recorder):
        self.recorder = recorder
        self.seen: dict[tuple[str, int | str], tuple[Tensor, int]] = {}
        self.handles = []
        for name, owner in model.named_modules():
            for index, entry in enumerate(entries_of(owner)):
                module = _module_of(owner, str(entry.get("module")))
                if module is None or not isinstance(entry.get("num_chs"), int):
                    continue
                note = partial(self._note, (name, index), entry["num_chs"])
                if entry.get("hook_type") == "forward_pre":
                    self.handles.append(module.register_forward_pre_hook(lambda _, args, note=note: note(args)))
                else:
                    self.handles.append(module.register_forward_hook(lambda _, args, out, note=note: note(out)))
            width, forward = owner.__dict__.get(NUM_FEATURES), getattr(owner, "forward_features", None)
            if isinstance(width, int) and callable(forward):
                owner.forward_features = self._noted(forward, partial(self._note, (name, NUM_FEATURES), width))

    def _noted(self, forward: Callable, note: Callable) -> Callable:
        @wraps(forward)
        def run(*args, **kwargs):
            out = forward(*args, **kwargs)
            note(out)
            return out

        return run

    def _note(self, key: tuple[str, int | str], width: int, value: object) -> None:
        maps = [tensor for tensor in tensors_in(value) if self.recorder.is_tracked(tensor)]
        if maps:
            self.seen[key] = (self.recorder.mark_of(maps[0]).labels, width)

    def close(self) -> None:
        """Write to the trace what was seen: the one dimension of a map that is as long as the width and holds channels."""
        for handle in self.handles:
            handle.remove()
        for key, (labels, width) in self.seen.items():
            for dim in (1, labels.dim() - 1):
                if labels.dim() > dim and labels.shape[dim] == width:
                    along = self.recorder.channels.along(labels, dim)
                    if along is not None:
                        self.recorder.trace.described[key] = along
                        break


def describe_features_(model: nn.Module, widths: Mapping[tuple[str, int | str], int]) -> None:
    """Set what modules say of their widths.

    Args:
        model: changed in place.
        widths: {(module, what): channels}, of the keys of ``Trace.described``.
    """
    for (name, what), width in widths.items():
        owner = model.get_submodule(name)
        if what == NUM_FEATURES:
            owner.num_features = width
        else:
            entries_of(owner)[int(what)]["num_chs"] = width
