"""Merging every module that has an adapter or is linear by its forward, and leaving those that compute something else.

An adapter recognises a block by its children. Before a merge is accepted, a copy is merged and compared with the block: on
the block's own input, cut to small maps, at three scales.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rep_plugin.attached import detach_all_
from rep_plugin.blocks.conv_like import ConvLike
from rep_plugin.errors import RepPluginError, first_line
from rep_plugin.measure.branches import Branches
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.differences import flatten_outputs, shapes_of
from rep_plugin.measure.forward import first_image, run_model
from rep_plugin.measure.report import BlockReport
from rep_plugin.measure.verify import run_exact
from rep_plugin.reparam.adapters import find_adapter
from rep_plugin.reparam.fixed import ADVICE, UNSELECTED, Fixed
from rep_plugin.reparam.linear_parts import KIND, LinearPart, find_part, may_hold, merge_part

RECOGNISED = 1e-6  # relative: the proof of the whole model is finer
SCALES = (1.0, 1e-3, 1e3)
_SIDES = ((16, 13), (9, 12))
_OWN = vars(nn.Module()).keys()  # what torch keeps on a module


def merge_blocks_(
    model: nn.Module,
    left: Collection[str] = (),
    prefix: str = "",
    parts: Collection[str] | None = None,
    reasons: dict[str, str] | None = None,
    borders: bool = True,
) -> tuple[nn.Module, list[BlockReport]]:
    """Merge every module that has an adapter, outermost first, then those that are linear by their forward, in place.

    What a merge leaves is looked through as well: a block may be merged in part. A module that stands in several places is
    merged once and stays shared. Look-alikes of convolutions inside a block are merged before it: it reads convolutions.

    Args:
        model: the model, in eval mode.
        left: names of blocks that stay as they are.
        prefix: name of the model, where it is a part of another one.
        parts: names of the modules whose forward is read; None: all.
        reasons: is given {name: why} of modules in which branches meet and that cannot be merged.
        borders: merge those too whose bias depends on the position.

    Returns:
        The model (the root may be replaced), and its blocks.
    """
    blocks: list[BlockReport] = []
    done: dict[nn.Module, nn.Module] = {}

    def drop_inside(name: str) -> None:
        blocks[:] = [block for block in blocks if name and not block.name.startswith(f"{name}.")]

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module in done:
            return done[module]
        merged = module
        adapter = None if name in left else find_adapter(module)
        if adapter is not None:
            for key, part in list(module.named_modules()):
                if part is not module and isinstance(part, ConvLike):
                    module.set_submodule(key, visit(f"{name}.{key}", part))
            drop_inside(name)
            try:
                merged = adapter.merge(module)
            except RepPluginError as error:
                raise type(error)(f"block {name!r} ({adapter.name}): {error}") from error
            blocks.append(BlockReport(name, adapter.name))
            _carry_over_(module, merged)
        done[module] = done[merged] = merged
        for key, child in list(merged._modules.items()):
            if child is not None and (new := visit(f"{name}.{key}" if name else key, child)) is not child:
                merged._modules[key] = new
        if adapter is None and name not in left and (parts is None or name in parts) and may_hold(merged):
            part = find_part(merged, borders, root=not name)
            if isinstance(part, LinearPart):
                drop_inside(name)
                blocks.append(BlockReport(name, f"{type(merged).__name__}, {KIND}"))
                merged = done[module] = merge_part(part)
                _carry_over_(module, merged)
                done[merged] = merged
            elif part is not None and reasons is not None:
                reasons[name] = part
        return merged

    whole = visit(prefix, model)
    _repoint_(whole, done)
    return whole, blocks


def _carry_over_(module: nn.Module, merged: nn.Module) -> None:
    """Keep plain attributes of a block on what takes its place: parents may read them."""
    for key, value in vars(module).items():
        if not key.startswith("_") and not isinstance(value, (nn.Module, Tensor)) and not hasattr(merged, key):
            setattr(merged, key, value)


def _repoint_(model: nn.Module, done: Mapping[nn.Module, nn.Module]) -> None:
    """Let plain lists, dicts and attributes that hold replaced modules hold what took their place."""

    def merged_of(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return done.get(value, value)
        if isinstance(value, list):
            value[:] = map(merged_of, value)
        elif isinstance(value, dict):
            value.update({key: merged_of(one) for key, one in value.items()})
        elif type(value) is tuple:
            return tuple(map(merged_of, value))
        return value

    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, (nn.Module, list, dict, tuple)) and key not in _OWN:
                vars(module)[key] = merged_of(value)


def find_left(model: nn.Module, x: Any, fixed: Fixed, branches: Branches) -> tuple[nn.Module, list[BlockReport]]:
    """Find the blocks of a model that are merged by their forward, and those that must stay as they are.

    Args:
        model: the model, in eval mode. It is not changed.
        x: what it is called with.
        fixed: what of it must stay as it is. Its ``parts`` and ``blocks`` are set.
        branches: where its forward decides by values or sizes.

    Returns:
        A copy in float64 that is merged so, and its blocks.
    """
    accepted: list[str] = []
    for name, module in model.named_modules():
        if not fixed.selects(name) and (may_hold(module) or find_adapter(module) is not None):
            fixed.blocks[name] = UNSELECTED
        if find_adapter(module) is None or _is_inside(name, accepted) or name in fixed.blocks:
            continue
        why = fixed.why_not_merged(name) or _why_lost(name, module, fixed)
        if why is None and not _is_ours(module):
            why = branches.inside(name)
        if why is None:
            accepted.append(name)
        else:
            fixed.blocks[name] = why
    compared: list[str] = []
    while True:  # where one is refused, another may stand inside it
        reasons: dict[str, str] = {}
        merged, blocks = merge_blocks_(copy_model(model).double(), fixed.blocks, reasons=reasons, borders=fixed.borders)
        fixed.parts = [block.name for block in blocks if block.kind.endswith(KIND)]
        new: list[str] = []
        for block in blocks:
            if not _is_inside(block.name, [*compared, *new]) and not _is_ours(model.get_submodule(block.name)):
                new.append(block.name)
        inputs, refused = _inputs_of(model, x, new) if new else {}, {}
        for name in new:
            module, why = model.get_submodule(name), None
            if name in fixed.parts:
                why = fixed.why_not_merged(name) or _why_lost(name, module, fixed) or branches.inside(name)
            why = why or _why_not_recognised(module, merged.get_submodule(name), inputs.get(name))
            if why is None:
                compared.append(name)
            else:
                refused[name] = why
        fixed.blocks |= refused
        if not refused:
            fixed.blocks = reasons | fixed.blocks
            return merged, blocks


def _is_inside(name: str, outer: Collection[str]) -> bool:
    return any(not one or name == one or name.startswith(f"{one}.") for one in outer)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("rep_plugin.")


def _why_lost(name: str, module: nn.Module, fixed: Fixed) -> str | None:
    """What is attached to a module that the merge takes away; what it keeps (an activation behind the sum) may have hooks."""
    inside = f"{name}." if name else ""
    attached = {key.removeprefix(inside): what for key, what in fixed.forwards.items() if f"{key}.".startswith(inside)}
    attached = {("" if key == name else key): what for key, what in attached.items()}
    if not attached:
        return None
    copied = detach_all_(copy_model(module))
    parts = dict(copied.named_modules(remove_duplicate=False))
    stay = set(merge_blocks_(copied, prefix=name, parts=fixed.parts, borders=fixed.borders)[0].modules())
    for key, what in attached.items():
        if parts[key] not in stay or (not key and " of its own" in what):
            return f"{(inside + key if key else name) or 'the model'!r} {what}: {ADVICE}"
    return None


def _inputs_of(model: nn.Module, x: Any, names: Collection[str]) -> dict[str, Any]:
    """What the first call of each of these modules is given for the first image; a tensor alone, cut to small maps."""
    copied, calls = copy_model(model), {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: Mapping) -> None:
            calls.setdefault(name, tree_map(_cut, (args, dict(kwargs))))

        return hook

    for name in names:
        copied.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        run_model(copied, copy_inputs(first_image(x)[0] if isinstance(x, Tensor) else x))
    return calls


def _cut(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().double() if value.is_floating_point() else value.detach().clone()


def _why_not_recognised(block: nn.Module, merged: nn.Module, call: tuple[tuple, dict] | None) -> str | None:
    """Compare a block with what its merge makes of it, in float64."""
    exact, merged = detach_all_(copy_model(block)).double(), detach_all_(copy_model(merged))
    if call is None:  # no input runs it
        conv = next((module for module in merged.modules() if isinstance(module, nn.Conv2d)), None)
        if conv is None:
            return None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, conv.in_channels, 16, 13, dtype=torch.float64, generator=generator)
        call = (x.to(conv.weight.device),), {}
    for args, kwargs in _small_calls(exact, call):
        for scale in SCALES:
            if (why := _why_different(exact, merged, *tree_map(partial(_times, scale), (args, kwargs)))) is not None:
                return f"it is not recognised: {why}"
    return None


def _times(scale: float, leaf: Any) -> Any:
    return leaf * scale if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _small_calls(block: nn.Module, call: tuple[tuple, dict]) -> list[tuple[tuple, dict]]:
    """The call on maps cut to small sides; as it is where there is no single map, or the block takes its size alone."""
    args, kwargs = call
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return [call]
    cut = [args[0][:, :, :height, :width] for height, width in _SIDES]
    calls = [((one,), {}) for one in cut if _try(block, (one,), {}) is not None]
    return calls or [call]


def _try(block: nn.Module, args: tuple, kwargs: Mapping) -> Any:
    try:
        return run_exact(block, *copy_inputs(args), **copy_inputs(kwargs))
    except Exception:  # what a block does not take it refuses in its own way
        return None


def _relative(expected: Tensor, found: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()


def _why_different(block: nn.Module, merged: nn.Module, args: tuple, kwargs: Mapping) -> str | None:
    expected = _try(block, args, kwargs)
    if expected is None or not all(torch.isfinite(out).all() for out in flatten_outputs(expected)):
        return None
    try:
        found = run_exact(merged, *copy_inputs(args), **copy_inputs(kwargs))
    except Exception as error:  # torch's, of shapes that do not fit
        return f"merged, it does not run: {first_line(error)}"
    if shapes_of(expected) != shapes_of(found):
        return f"merged, its output is {shapes_of(found)} in the place of {shapes_of(expected)}"
    off = max(map(_relative, flatten_outputs(expected), flatten_outputs(found)), default=0.0)
    if off <= RECOGNISED:
        return None
    largest = max((a.abs().max().item() for a in args if isinstance(a, Tensor) and a.numel()), default=0.0)
    return f"merged, it differs by {off:.1e} relative at inputs up to {largest:.1e}"
