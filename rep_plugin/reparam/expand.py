"""``expand``: put a multi-branch block in the place of every spatial convolution, and change nothing yet.

The network's own BN stays behind the block. In the block the original kernel is one branch, whose BN takes the outer
BN's running mean and variance, with gamma = sqrt(var + eps) and beta = mean: the identity in eval mode. In train mode
this BN normalises with the batch, and the outer one then sees the running mean and about the running variance: its output
is the stock one's up to ``eps * |1 / (running_var + eps) - 1 / (batch_var + eps)| / 2``, relative. All other branches end
in a BN with gamma 0.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import OneOf, checked
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.conv_like import CONV_LIKES, ConvLike, like_conv, look_alike, why_not_replaceable
from rep_plugin.errors import ArgumentError
from rep_plugin.history import before_step, layer_named, record_, replays
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import Example, require_bare, takes_examples
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.report import BlockReport, Report
from rep_plugin.measure.undo import undone_on_error
from rep_plugin.measure.verify import default_inputs, require_rounded, verify_equivalence
from rep_plugin.reparam.fold_bn import find_pairs_by_parts, replace_module_
from rep_plugin.reparam.selection import Where, selector

TOLERANCE = 1e-9  # relative, in float64


def own_convs(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolutions of a model that are not inside one of our blocks, shared ones once.

    Args:
        model: the model.
        prefix: prefix of the names.

    Yields:
        Name and convolution.
    """
    inside: list[str] = []
    for name, module in model.named_modules(prefix=prefix):
        if isinstance(module, RepBlock):
            inside.append(f"{name}." if name else "")
        elif isinstance(module, nn.Conv2d) and not name.startswith(tuple(inside)):
            yield name, module


def _choose(model: nn.Module, where: Where, copied: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the (conv, bn) names to expand and notes on what is left out. Raises ValueError where nothing remains.

    ``copied`` is in eval mode, to be traced: stochastic depth cannot be, in train mode.
    """
    convs = dict(own_convs(model))
    if not convs:
        blocks = sum(isinstance(module, RepBlock) for module in model.modules())
        what = f"consists of {blocks} rep_plugin blocks" if blocks else "has no convolution"
        raise ArgumentError(f"{type(model).__name__} {what}, expected convolutions outside of such blocks to expand")
    chosen = selector(where, list(convs), "convolutions")
    wanted = [name for name, module in convs.items() if chosen(name, module)]
    pairs, untraced = find_pairs_by_parts(copied)
    bn_of = dict(pairs)
    take, reasons = [], {}
    for name in wanted:
        reason = why_not_replaceable(convs[name])
        if not reason and name not in bn_of:
            reason = "no BN with running statistics was seen to be its only reader"
        if not reason and model.get_submodule(bn_of[name]).weight is None:
            reason = "its BN has no gamma"
        if reason:
            reasons.setdefault(reason, []).append(name)
        else:
            take.append((name, bn_of[name]))
    notes = [f"{len(names)} left as they are, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    notes += [f"not traced, only the parts inside: {failure}" for failure in untraced]
    if not take and not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ArgumentError(
            f"{type(model).__name__} has no BN, expected a convolution with one behind it: a merged model keeps its own with "
            "reparameterize(..., fold_bn=False)"
        )
    if not take:
        why = "".join(f"; {note}" for note in notes[:2])
        raise ArgumentError(f"where={where!r} selects nothing of {len(convs)} convolutions to expand{why}")
    return take, notes


def find_expandable(model: nn.Module, where: Where = None) -> tuple[list[str], list[str]]:
    """Find what :func:`expand` would replace; nothing is changed.

    Args:
        model: the model.
        where: as in :func:`expand`.

    Returns:
        Names of the convolutions, and notes on what is left out.

    Raises:
        ArgumentError: there is nothing to expand; the message says why.
    """
    copied = copy_model(model)
    copied.eval()
    pairs, notes = _choose(model, where, copied)
    return [conv for conv, _ in pairs], notes


def _block_for(conv: nn.Conv2d, bn: nn.Module, block: str, online: bool) -> ConvLike:
    """Return the block that computes what ``conv`` does, given the BN that follows it."""
    made = like_conv(conv, block, online=online)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = bn.eps, bn.momentum
    made.silence_()
    main = made.branches[made.main_branch]
    main.conv.weight = conv.weight  # the same parameter: what else holds it goes on holding it
    if online:
        norms = torch.linalg.vector_norm(conv.weight, dim=(1, 2, 3))
        main.conv.gain.copy_(torch.sqrt(norms.square() + main.conv.eps))
    if (inner := getattr(made, "post_bn", None) if online else main.bn) is not None:
        mean, std = bn.running_mean, torch.sqrt(bn.running_var + bn.eps)
        inner.running_mean.copy_(mean if conv.bias is None else mean - conv.bias)
        inner.running_var.copy_(bn.running_var)
        inner.weight.copy_(std)
        inner.bias.copy_(mean)
    made.is_init = True
    if isinstance(bn, nn.SyncBatchNorm):
        made = nn.SyncBatchNorm.convert_sync_batchnorm(made, bn.process_group)
    made.train(conv.training)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = bn.training  # a BN that is kept in eval mode stays so
    return made


@torch.no_grad()
def _expand_(model: nn.Module, block: str, pairs: Sequence[tuple[str, str]], online: bool) -> nn.Module:
    for conv_name, bn_name in pairs:
        conv = model.get_submodule(conv_name)
        replace_module_(model, conv, _block_for(conv, model.get_submodule(bn_name), block, online))
    for module in model.modules():
        if hasattr(type(module), "is_init"):
            module.is_init = True  # mmengine's BaseModule: init_weights() would overwrite what was expanded
    return model


@checked
@takes_examples
@working("expanding")
@private_random()
def expand(
    model: nn.Module,
    block: Annotated[str, OneOf(CONV_LIKES)] = "dbb",
    inplace: bool = False,
    where: Where = None,
    example_input: Example | None = None,
    online: bool = False,
) -> tuple[nn.Module, Report]:
    """Turn spatial convolutions into blocks of several branches; return the model, still the same function, and a report.

    A convolution, depthwise ones included, is expanded where its kernel is larger than 1, its padding zeros, and a BN its
    only reader (found by torch.fx, part by part where the whole model cannot be traced). The others are named in
    ``report.notes``, with the reason. The output in eval mode is proven unchanged in float64 (relative tolerance 1e-9). In
    train mode it starts unchanged as well, but for terms of the BN's eps. The model's mode is kept.

    The original kernels stay the same parameters with ``inplace=True``, but there are new ones beside them: **build the
    optimizer after this call**, and wrap for DDP after it. mmengine modules are marked as initialised, for a Runner would
    otherwise initialise the network anew. After training, :func:`rep_plugin.reparameterize` gives the stock network back,
    with ``fold_bn=False`` key by key.

    Args:
        model: the model; it stays as it was where an error is raised.
        block: ``dbb``, ``acb``, ``repvgg`` (or ``rep``) or ``mobileone``.
        inplace: expand the given model, not a copy.
        where: which convolutions: a shell pattern on the full name (``'layer1.*'``), several, or a function
            ``(name, module) -> bool``; None: all.
        example_input: images (N, C, H, W) for the proof, which also runs random images; or a tuple or a dict of all that the
            model is called with.
        online: merge the branches in every training step, which is several times as fast: norms of filters stand for the
            branches' BNs, and the network's own BN follows their sum.

    Returns:
        The expanded model and the report.

    Raises:
        ArgumentError: an unknown block, a pattern that fits nothing, or nothing to expand.
        EquivalenceError: the proof fails.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
        >>> expanded, report = expand(model, "dbb")
        >>> type(expanded[0]).__name__, report.max_rel_error < 1e-9
        ('DBBConv2d', True)
    """
    started = time.perf_counter()
    require_bare(model)
    look_alike(block)
    before = before_step(model)
    exact = copy_model(model).double()
    exact.eval()  # not chained: mmpretrain's return None
    pairs, notes = _choose(model, where, exact)
    inputs = default_inputs(model, example_input)
    report = Report("expand", count_params(model), 0, count_macs(model, inputs[0]), input_shape=tuple(inputs[0].shape))

    _expand_(exact, block, pairs, online)
    found = verify_equivalence(model, exact, inputs, [conv for conv, _ in pairs], TOLERANCE, name="example_input")
    report.blocks = [BlockReport(name, block) for name, _ in pairs]
    report.notes = notes
    report.add_proof(found)

    with undone_on_error(*([model] if inplace else [])):
        expanded = _expand_(model if inplace else copy_model(model), block, pairs, online)
        expanded.load_state_dict(exact.state_dict())  # what was proven, rounded once
        require_rounded(expanded, exact)
        report.params_after, report.macs_after = count_params(expanded), count_macs(expanded, inputs[0])
        record_(expanded, before, step="expand", block=block, pairs=[list(pair) for pair in pairs], online=online)
    report.seconds = time.perf_counter() - started
    return expanded, report


@replays("expand", "block", "pairs", "online")
def _replay(model: nn.Module, block: str, pairs: Sequence[Sequence[str]], online: bool) -> nn.Module:
    look_alike(block)
    for conv_name, bn_name in pairs:
        conv, bn = layer_named(model, conv_name), layer_named(model, bn_name)
        if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise ArgumentError(
                f"the history is of another model: it expands {conv_name!r} in front of {bn_name!r}, which are "
                f"{type(conv).__name__} and {type(bn).__name__}, expected a convolution and a BN"
            )
    return _expand_(model, block, [(conv, bn) for conv, bn in pairs], online)
