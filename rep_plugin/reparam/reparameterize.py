"""``reparameterize``: merge every block of a model, prove the result, and say what was done."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import checked
from rep_plugin.blocks.annealed_layers import has_segments, require_finished, set_segments_
from rep_plugin.blocks.conv_like import ConvLike
from rep_plugin.blocks.layers import require_eval_mode
from rep_plugin.errors import NothingToMergeError
from rep_plugin.history import before_step, record_, replays
from rep_plugin.measure.branches import Branches, find_branches
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import Example, require_bare, takes_examples
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.report import BlockReport, Report
from rep_plugin.measure.undo import undone_on_error
from rep_plugin.measure.verify import Equivalence, default_inputs, require_rounded, verify_equivalence
from rep_plugin.reparam.fixed import UNSELECTED, Fixed, find_fixed
from rep_plugin.reparam.fold_bn import absorb_biases_, fold_conv_bn_, is_frozen_bn
from rep_plugin.reparam.linear_layers import CONV_NORM_CLASSES
from rep_plugin.reparam.linear_parts import can_merge_itself
from rep_plugin.reparam.merge_blocks import Merged, find_left, merge_blocks_
from rep_plugin.reparam.merge_segments import merge_segments_
from rep_plugin.reparam.merge_sequence import merge_linear_
from rep_plugin.reparam.selection import Where, select_modules

TOLERANCE = 1e-9  # relative, in float64
# These are proven end to end: under the block's own name stands another part of the whole than before.
CONV_BN, BN_CONV, SEQUENCE = "Conv-BN", "BN-Conv", "linear sequence"


def _holds_bn(module: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _find_self_merging(model: nn.Module) -> dict[str, str]:
    """Names and classes of the innermost modules with a BN that can merge themselves.

    One convolution and its BN is not meant: that is a matter of ``fold_bn``.
    """
    able = [name for name, module in model.named_modules() if can_merge_itself(module)]
    outer = {name for name in able for other in able if other != name and other.startswith(f"{name}." if name else "")}
    inner = [name for name in able if name not in outer]
    modules = dict(model.named_modules())
    return {
        name: f"{type(modules[name]).__module__}.{type(modules[name]).__qualname__}"
        for name in inner
        if _holds_bn(modules[name]) and type(modules[name]).__name__ not in CONV_NORM_CLASSES
    }


def _note_unknown(model: nn.Module, able: dict[str, str], merged: list[str]) -> list[str]:
    """One line for each class of ``able`` that no adapter took, around it or in it, and that still holds BNs."""
    left: dict[str, list[str]] = {}
    for name, kind in able.items():
        known = any(
            f"{name}.".startswith(f"{m}." if m else "") or m.startswith(f"{name}." if name else "") for m in merged
        )
        if not known and _holds_bn(model.get_submodule(name)):
            left.setdefault(kind, []).append(name)
    return [
        f"not merged: {len(names)} of {kind}, first {names[0]!r}: it can merge itself, but there is no adapter for it here "
        "(rep_plugin.reparam.register_adapter)"
        for kind, names in left.items()
    ]


def _note_left(blocks: Mapping[str, str]) -> list[str]:
    """One line for each reason."""
    names: dict[str, list[str]] = {}
    for name, why in blocks.items():
        if why != UNSELECTED:
            names.setdefault(why, []).append(repr(name) if name else "the model")
    return [
        f"{'' if same[0] == 'the model' else 'block '}{same[0]} is left as it is: {why}"
        if len(same) == 1
        else f"blocks {', '.join(same[:3])}{f' and {len(same) - 3} more' * (len(same) > 3)} are left as they are: {why}"
        for why, same in names.items()
    ]


@dataclass
class _Conversion:
    """``parts``, kept for a proof, are the merged blocks before the network's own BNs were folded or moved."""

    model: nn.Module
    blocks: list[BlockReport]
    parts: dict[str, nn.Module]
    notes: list[str]


def _convert(
    model: nn.Module,
    fold_bn: bool,
    merge_linear: bool,
    fixed: Fixed,
    merge: Callable[[nn.Module], Merged],
    segments: Sequence[BlockReport] = (),
    keep: bool = False,
) -> _Conversion:
    """Merge blocks and fold what is left, in place or in a copy that ``merge`` gives; keep what a proof of that needs.

    ``segments`` are merged already.
    """
    able, before = _find_self_merging(model), set(model.modules())
    bias_free = [name for name, m in model.named_modules() if name and isinstance(m, ConvLike) and m.bias_free]
    merged = merge(model)
    model, blocks = merged.model, list(merged.blocks)
    parts = {block.name: copy_model(model.get_submodule(block.name)) for block in blocks} if keep else {}
    notes = _note_left(fixed.blocks)
    bias_free = [name for name in bias_free if name not in fixed.blocks]
    if not fold_bn and (biased := absorb_biases_(model, bias_free, fixed)):
        notes.append(f"{len(biased)} convolutions keep a bias, as no BN alone reads them: {', '.join(biased)}")
    if merge_linear:
        sequences, left = merge_linear_(model, fixed)
        notes += left
        blocks += _reports_of(sequences)
    if fold_bn and any(isinstance(m, _BatchNorm) or is_frozen_bn(m) for m in model.modules()):
        pairs, left = fold_conv_bn_(model, fixed)
        blocks += [BlockReport(conv, f"{BN_CONV if first else CONV_BN} ({bn})") for conv, bn, first in pairs]
        notes += left
    notes += _note_unknown(model, able, [*(block.name for block in merged.blocks), *fixed.blocks])
    if not blocks and not segments:
        if not fold_bn and any(isinstance(m, _BatchNorm) for m in model.modules()):
            notes.append("its batch norms can be folded: fold_bn=True (--fold-bn)")
        raise NothingToMergeError(f"{type(model).__name__} holds no block that can be merged", notes)
    for module in set(model.modules()) - before:
        module.training = False  # nothing was in train mode, and what stands there now must not be
    return _Conversion(model, [*segments, *blocks], parts, notes)


def _reports_of(sequences: Sequence[tuple[str, Sequence[str]]]) -> list[BlockReport]:
    return [BlockReport(name, f"{SEQUENCE} ({', '.join(layers)})") for name, layers in sequences]


def _merge_segments_(model: nn.Module) -> list[BlockReport]:
    """Merge what was linearized, whole and first: what is left is merged as in any other model."""
    return _reports_of(merge_segments_(model)) if has_segments(model) else []


@checked
@takes_examples
@working("merging")
@private_random()
def reparameterize(
    model: nn.Module,
    example_input: Example | None = None,
    inplace: bool = False,
    verify: bool = True,
    fold_bn: bool = True,
    merge_linear: bool = False,
    where: Where = None,
    skip: Where = None,
) -> tuple[nn.Module, Report]:
    """Merge all branches of every block into one convolution each; return the merged model and a report.

    The proof compares a merged float64 copy with the original, block by block and end to end, on the example and on random
    inputs, an odd size among them; relative tolerance 1e-9. Multi-branch blocks are recognised by what their forward
    computes, whatever they are called. Those of timm, mmpretrain and the official repositories get the names of their own
    deployed forms (:mod:`rep_plugin.reparam.layouts`). ``report.notes`` name what is left as it is: blocks whose forward
    cannot be read, layers with hooks, replaced methods or shared weights, and modules that can merge themselves but are not
    recognised here.

    Args:
        model: a model in eval mode; it stays as it was where an error is raised.
        example_input: images (N, C, H, W) for the proof; or a tuple or a dict of all that the model is called with.
        inplace: merge the given model, not a copy. The root itself may be replaced: use the returned model.
        verify: prove the result.
        fold_bn: fold the network's own Conv-BN pairs too, and BNs in front of unpadded convolutions. False keeps them:
            look-alikes (:mod:`rep_plugin.blocks.conv_like`) become the plain convolutions they stand for, the merged bias
            going into the next BN's running mean, so that the state dict is that of the stock network.
        merge_linear: merge linear sequences that were trained as separate, zero-padded layers too, exact at the border, where
            that costs no more multiply-adds.
        where: what is merged and folded: a shell pattern on full names (``'stages.0*'``), several, or a function
            ``(name, module) -> bool``; all inside of what fits is meant. None: everything. What was linearized is merged in
            any case.
        skip: what is left as it is, likewise.

    Returns:
        The merged model and the report.

    Raises:
        TrainModeError: a BN is in train mode.
        NotMergeableError: a layer of a block is not linear.
        NothingToMergeError: the model holds nothing to merge.
        EquivalenceError: the proof fails; it names the first block that is off.
        AnnealError: what was linearized is not annealed to its end.

    Example:
        >>> from rep_plugin.blocks.families import RepVGGBlock
        >>> model = nn.Sequential(RepVGGBlock(3, 8, 3), nn.ReLU()).eval()
        >>> merged, report = reparameterize(model)
        >>> [block.name for block in report.blocks], report.max_rel_error < 1e-9
        (['0'], True)
    """
    started = time.perf_counter()
    before = before_step(model)
    require_bare(model)
    require_eval_mode(model)
    inputs = default_inputs(model, example_input)
    counted = inputs[0] if example_input is not None else inputs[0][:1]
    report = Report("reparameterize", count_params(model), 0, input_shape=tuple(counted.shape))
    report.macs_before = count_macs(model, counted)
    start, x, segments = model, inputs[0], []
    if has_segments(model):
        require_finished(model)
        start, x = copy_model(model).double(), inputs[0].double()
        segments = _merge_segments_(start)
    fixed, exact, branches = find_fixed(start), None, find_branches(start, x)
    fixed.borders, fixed.only = merge_linear, select_modules(start, where, skip)
    merged_exactly = find_left(start, x, fixed, branches)
    if verify:
        exact = _convert(start, fold_bn, merge_linear, fixed, lambda _: merged_exactly, segments, keep=True)
        report.blocks = exact.blocks
        report.add_proof(_prove(model, exact, inputs, branches if start is model else None))
        exact.parts.clear()
    with undone_on_error(*([model] if inplace else [])):
        known = partial(merge_blocks_, left=fixed.blocks, borders=merge_linear, known=merged_exactly.parts)
        given = model if inplace else copy_model(model)
        _merge_segments_(given)
        done = _convert(given, fold_bn, merge_linear, fixed, known, segments)
        merged = done.model
        if exact is None:
            report.blocks = done.blocks
        else:
            merged.load_state_dict(exact.model.state_dict())  # rounded once, where two steps in float32 round twice
            require_rounded(merged, exact.model)
        report.params_after, report.macs_after = count_params(merged), count_macs(merged, counted)
        report.notes += done.notes
        report.notes += [f"block {n!r} is merged in part: {p.left}" for n, p in merged_exactly.parts.items() if p.left]
        names = {"left": sorted(fixed.blocks), "parts": sorted(fixed.unlisted)}
        names = {key: value for key, value in names.items() if value}
        names |= {} if fixed.only is None else {"only": sorted(fixed.only)}
        record_(merged, before, step="reparameterize", fold_bn=fold_bn, merge_linear=merge_linear, **names)
    report.seconds = time.perf_counter() - started
    return merged, report


@replays("reparameterize", "fold_bn", "merge_linear", optional=("left", "parts", "only"))
def _replay(
    model: nn.Module,
    fold_bn: bool,
    merge_linear: bool,
    left: Sequence[str] = (),
    parts: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> nn.Module:
    set_segments_(model, 1.0)  # its weights, the alphas too, are loaded next
    segments, fixed = _merge_segments_(model), find_fixed(model)
    fixed.blocks, fixed.only = dict.fromkeys(left, ""), None if only is None else set(only)
    merge = partial(merge_blocks_, left=fixed.blocks, unlisted=list(parts), borders=merge_linear)
    done = _convert(model, fold_bn, merge_linear, fixed, merge, segments)  # not run: nothing says which inputs it takes
    return done.model


def _prove(model: nn.Module, exact: _Conversion, inputs: list[Tensor], branches: Branches | None) -> Equivalence:
    """Compare the merged float64 copy with the model."""
    proven_whole = (CONV_BN, BN_CONV, SEQUENCE)
    names = [block.name for block in exact.blocks if block.name and not block.kind.startswith(proven_whole)]
    own = {name for name, _ in model.named_modules(remove_duplicate=False)}
    folded = [block.name for block in exact.blocks if block.kind.startswith(proven_whole) and block.name in own]
    return verify_equivalence(
        model,
        exact.model,
        inputs,
        names,
        TOLERANCE,
        exact.parts,
        run_names=folded,
        branches=branches,
        name="example_input",
    )
