"""Merging every module that has an adapter or is linear by its forward, and leaving those that compute something else.

Before a merge is accepted, a copy is merged and compared with the block: on the block's own input, cut to small maps, at
three scales.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from rep_plugin.attached import detach_all_
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.conv_like import ConvLike
from rep_plugin.errors import EquivalenceError, RepPluginError, TraceError
from rep_plugin.measure.branches import Branches
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.differences import flatten_outputs
from rep_plugin.measure.forward import first_image, run_model
from rep_plugin.measure.report import BlockReport
from rep_plugin.measure.verify import SCALES, Call, UnstableError, compare_call
from rep_plugin.reparam.adapters import find_adapter
from rep_plugin.reparam.fixed import ADVICE, UNSELECTED, Fixed
from rep_plugin.reparam.layouts import Layout, find_layout
from rep_plugin.reparam.linear_parts import KIND, LinearPart, find_part, looks_branched, may_hold, merge_part

RECOGNISED = 1e-6  # relative: the proof of the whole model is finer
_SIDES = ((16, 13), (9, 12))
_OWN = vars(nn.Module()).keys()  # what torch keeps on a module


@dataclass
class Merged:
    """A model whose blocks are merged.

    Args:
        model: the model; its root may be another one than the given one.
        blocks: what was merged.
        parts: {name of a block: what of its forward was merged}.
        reasons: {name: why} of modules in which branches meet and that cannot be merged.
    """

    model: nn.Module
    blocks: list[BlockReport] = field(default_factory=list)
    parts: dict[str, LinearPart] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def unlisted(self) -> list[str]:
        """Names of the blocks that are merged by their forward alone, their layout being unknown."""
        return [name for name, part in self.parts.items() if part.layout is None]


def merge_blocks_(
    model: nn.Module,
    left: Collection[str] = (),
    prefix: str = "",
    unlisted: Collection[str] | None = None,
    borders: bool = True,
    known: Mapping[str, LinearPart] | None = None,
) -> Merged:
    """Merge every module that has an adapter, outermost first, then those that are linear by their forward, in place.

    What a merge leaves is looked through as well: a block may be merged in part. A module that stands in several places is
    merged once and stays shared. Look-alikes of convolutions inside a block are merged before it: it reads convolutions.

    Args:
        model: the model, in eval mode.
        left: names of blocks that stay as they are.
        prefix: name of the model, where it is a part of another one.
        unlisted: names of the blocks without a known layout whose forward is read; None: all.
        borders: merge those too whose bias depends on the position.
        known: what another copy of this model was found to hold: nothing else is merged by its forward.

    Returns:
        The model, its blocks and what is left.
    """
    return _Merger(left, unlisted, borders, known).run(model, prefix)


class _Merger:
    def __init__(
        self,
        left: Collection[str],
        unlisted: Collection[str] | None,
        borders: bool,
        known: Mapping[str, LinearPart] | None,
    ):
        self.left, self.unlisted, self.borders, self.known = left, unlisted, borders, known
        self.found = Merged(nn.Identity())
        self.done: dict[nn.Module, nn.Module] = {}
        self.made: dict[str, nn.Module] = {}

    def run(self, model: nn.Module, prefix: str) -> Merged:
        self.found.model = self.visit(prefix, model)
        _repoint_(self.found.model, self.done)
        return self.found

    def visit(self, name: str, module: nn.Module) -> nn.Module:
        if module in self.done:
            return self.done[module]
        merged, adapter = module, None if name in self.left else find_adapter(module)
        layout = None if adapter is not None or name in {*self.left, *(self.unlisted or ())} else find_layout(module)
        if adapter is not None or layout is not None:
            for key, part in list(module.named_modules()):
                if part is not module and isinstance(part, ConvLike):
                    module.set_submodule(key, self.visit(f"{name}.{key}", part))
        if adapter is not None:
            try:
                merged = adapter.merge(module)
            except RepPluginError as error:
                raise type(error)(f"block {name!r} ({adapter.name}): {error}") from error
            self.note(name, adapter.name, module, merged)
        elif layout is not None:
            merged = self.merge_part(name, module, layout)
        whole = adapter is None and merged is module
        self.done[module] = self.done[merged] = merged
        for key, child in list(merged._modules.items()):
            if child is not None and (new := self.visit(f"{name}.{key}" if name else key, child)) is not child:
                merged._modules[key] = new
        if whole and name not in self.left:
            if layout is not None and not layout.certain and self.is_in_blocks(name):
                merged = self.merge_part(name, module, layout)
            if merged is module:  # its forward is not what its names promise, or they promise nothing
                merged = self.merge_part(name, module, None)
        return merged

    def is_in_blocks(self, name: str) -> bool:
        """Return whether anything in a module was merged."""
        return any(not name or block.name.startswith(f"{name}.") for block in self.found.blocks)

    def merge_part(self, name: str, module: nn.Module, layout: Layout | None) -> nn.Module:
        """What takes a block's place; the block itself where its forward is not merged."""
        part = self.find(name, module, layout)
        if isinstance(part, LinearPart):
            merged = merge_part(part)
            kind = f"{type(module).__name__}, {KIND}" if part.layout is None else part.layout.name
            self.note(name, kind, module, merged)
            self.found.parts[name] = replace(part, module=merged)  # what it was is not held
            self.found.reasons.pop(name, None)
            return merged
        if part is not None:
            self.found.reasons.setdefault(name, part)
        return module

    def find(self, name: str, module: nn.Module, layout: Layout | None) -> LinearPart | str | None:
        if self.known is not None:
            part = self.known.get(name)
            if part is None:
                return None
            if not part.constants:
                return replace(part, module=module)
        elif layout is None and not (may_hold(module) and (self.unlisted is None or name in self.unlisted)):
            return None
        several = [one for one in self.made.values() if isinstance(one, fx.GraphModule) or _count_layers(one) > 1]
        kept = [key for key, one in module.named_modules() if one in several and one is not module]
        try:
            return find_part(module, self.borders, not name, layout, kept)
        except TraceError as error:
            certain = layout is not None and layout.certain
            return str(error) if certain or self.is_innermost(name, module) else None
        except RepPluginError as error:
            raise type(error)(f"block {name!r} ({layout.name if layout else ''}): {error}") from error

    def is_innermost(self, name: str, module: nn.Module) -> bool:
        """Return whether branches seem to meet in a module, and in none of those inside it."""
        inner = any(looks_branched(part) for part in module.modules() if part is not module)
        known = self.is_in_blocks(name) or any(not name or one.startswith(f"{name}.") for one in self.found.reasons)
        return looks_branched(module) and not inner and not known

    def note(self, name: str, kind: str, module: nn.Module, merged: nn.Module) -> None:
        """Note that a block was merged, in the place of what was merged inside it and is not there any more."""
        stay = set(merged.modules())
        inside = {one: made for one, made in self.made.items() if _is_inside(one, [name])}
        self.found.blocks = [one for one in self.found.blocks if inside.get(one.name, merged) in stay]
        used = {
            one for one, made in inside.items() if stay.intersection(made.modules())
        }  # a layer of it may be all that stays
        self.found.parts = {one: p for one, p in self.found.parts.items() if one not in inside or one in used}
        self.made[name] = merged
        self.found.blocks.append(BlockReport(name, kind))
        carry_over_(module, merged)
        self.done[module] = self.done[merged] = merged


def _count_layers(merged: nn.Module) -> int:
    return len(merged) if type(merged) is nn.Sequential else 1


def carry_over_(module: nn.Module, merged: nn.Module) -> None:
    """Keep plain attributes of a block on what takes its place: parents may read them.

    Args:
        module: the block.
        merged: what takes its place, changed in place.
    """
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


def _is_known(module: nn.Module) -> bool:
    return find_adapter(module) is not None or ((layout := find_layout(module)) is not None and layout.certain)


def find_mergeable(model: nn.Module) -> list[str]:
    """Return the names of the modules that :func:`merge_blocks_` would merge."""
    try:
        return [block.name for block in merge_blocks_(copy_model(model)).blocks]
    except RepPluginError:  # of a block that is known, but computes something else
        return [name for name, module in model.named_modules() if _is_known(module)]


def find_left(model: nn.Module, x: Any, fixed: Fixed, branches: Branches) -> Merged:
    """Find the blocks of a model that are merged by their forward, and those that must stay as they are.

    Args:
        model: the model, in eval mode. It is not changed.
        x: what it is called with.
        fixed: what of it must stay as it is. Its ``unlisted`` and ``blocks`` are set.
        branches: where its forward decides by values or sizes.

    Returns:
        A copy in float64 that is merged so.
    """
    accepted: list[str] = []
    for name, module in model.named_modules():
        known = _is_known(module)
        if not fixed.selects(name) and (known or may_hold(module)):
            fixed.blocks[name] = UNSELECTED
        if not known or _is_inside(name, accepted) or name in fixed.blocks:
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
        merged = merge_blocks_(copy_model(model).double(), fixed.blocks, borders=fixed.borders)
        fixed.unlisted = merged.unlisted
        new: list[str] = []
        for block in merged.blocks:
            if not _is_inside(block.name, [*compared, *new]) and not _is_ours(model.get_submodule(block.name)):
                new.append(block.name)
        inputs, refused = _inputs_of(model, x, new) if new else {}, {}
        for name in new:
            module, why = model.get_submodule(name), None
            if name in merged.parts and name not in accepted:
                why = fixed.why_not_merged(name) or _why_lost(name, module, fixed) or branches.inside(name)
            why = why or _why_not_recognised(module, merged.model.get_submodule(name), inputs.get(name))
            if why is None:
                compared.append(name)
            else:
                refused[name] = why
        fixed.blocks |= refused
        if not refused:
            fixed.blocks = merged.reasons | fixed.blocks
            return merged


def _is_inside(name: str, outer: Collection[str]) -> bool:
    return any(not one or name == one or name.startswith(f"{one}.") for one in outer)


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (RepBlock, ConvLike)) or type(module).__module__.startswith("rep_plugin.")


def _why_lost(name: str, module: nn.Module, fixed: Fixed) -> str | None:
    """What is attached to a module that the merge takes away; what it keeps (an activation behind the sum) may have hooks."""
    inside = f"{name}." if name else ""
    attached = {key.removeprefix(inside): what for key, what in fixed.forwards.items() if f"{key}.".startswith(inside)}
    attached = {("" if key == name else key): what for key, what in attached.items()}
    if not attached:
        return None
    copied = detach_all_(copy_model(module))
    parts = dict(copied.named_modules(remove_duplicate=False))
    merged = merge_blocks_(copied, prefix=name, unlisted=fixed.unlisted, borders=fixed.borders).model
    stay = set(merged.modules())
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


def _why_not_recognised(block: nn.Module, merged: nn.Module, given: tuple[tuple, dict] | None) -> str | None:
    """Compare a block with what its merge makes of it, in float64."""
    exact, merged = detach_all_(copy_model(block)).double(), detach_all_(copy_model(merged))
    if given is None:  # no input runs it
        conv = next((module for module in merged.modules() if isinstance(module, nn.Conv2d)), None)
        if conv is None:
            return None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, conv.in_channels, 16, 13, dtype=torch.float64, generator=generator)
        given = (x.to(conv.weight.device),), {}
    ran = False
    for call, is_cut in _calls(*given):
        if ran and not is_cut:
            break
        try:
            expected = call.run(exact)
        except Exception:  # what a block does not take it refuses in its own way
            continue
        ran = True
        if not all(torch.isfinite(out).all() for out in flatten_outputs(expected)):
            continue
        try:
            off = compare_call(call, exact, merged, expected, RECOGNISED)
        except UnstableError:
            continue
        except EquivalenceError as error:
            return f"it is not recognised: merged, it does something else: {error}"
        if off.exceeds(RECOGNISED):
            return f"it is not recognised: merged, it differs by {off.max_rel:.1e} relative in {off.where}"
    return None


def _calls(args: tuple, kwargs: dict) -> Iterator[tuple[Call, bool]]:
    """Calls of a block at all scales: of a single map cut to small sides, all in one batch; then of what it was given."""
    scales = (1.0, *SCALES)
    if len(args) == 1 and not kwargs and _is_float(args[0]) and args[0].dim() == 4:
        for height, width in _SIDES:
            cut = args[0][:, :, :height, :width]
            yield Call(nn.Module.__call__, (torch.cat([cut * scale for scale in scales]),)), True
    for scale in scales:
        scaled = tree_map(lambda leaf, scale=scale: leaf * scale if _is_float(leaf) else leaf, (args, kwargs))
        yield Call(nn.Module.__call__, *scaled), False


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
