"""Rules for modules that are one unit: re-parameterizable blocks, and bilinear pooling.

A rule takes the recorder, the module's name, the module and its inputs, and returns the (valueless) output and the marks of
its tensors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import checked
from rep_plugin.bilinear.methods import Full, ISqrtCov, LowRank, RandomMaclaurin, TensorSketch, Triangle
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.layers import NormedConv2d, Scale
from rep_plugin.errors import TraceError
from rep_plugin.functional.bilinear import triangle_index
from rep_plugin.pruning.tracing.graph import Layer, Mark, member
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules.convolution_linear_norm import convolve, goes_by_group, normalise
from rep_plugin.pruning.tracing.rules.registry import fixed_like, spread


@checked
def find_module_rule(module: nn.Module) -> Callable | None:
    """Return the rule for a module that is one unit, None for any other."""
    if isinstance(module, RepBlock):
        return _rep_block
    return _bilinear_pooling if isinstance(module, BilinearPooling) else None


def _run_chain(recorder: Recorder, name: str, ops: Sequence[tuple[str, nn.Module]], labels: Tensor) -> Tensor:
    """Follow channels (I,) through linear layers; return those of the outputs (O,)."""
    for op_name, op in ops:
        path = member(name, op_name)
        if isinstance(op, nn.Conv2d) and f"{path}.weight" not in recorder.trace.sizes:
            advice = "take it off first (torch.nn.utils.parametrize.remove_parametrizations)"
            reason = f"is tied to {path!r}, whose weight a parametrization computes: {advice}"
            recorder.channels.freeze(labels, reason)
            labels = recorder.channels.fresh(op.weight.shape[0])
            recorder.channels.freeze(labels, reason)
        elif isinstance(op, nn.Conv2d):
            bias = None if op.bias is None else f"{path}.bias"
            groups = len(labels) // op.weight.shape[1]
            labels, _ = convolve(recorder, labels, f"{path}.weight", bias, groups, op.weight.shape)
            if isinstance(op, NormedConv2d):
                recorder.add_slice(f"{path}.gain", 0, labels)
        elif isinstance(op, _BatchNorm):
            roles = ("weight", "bias", "running_mean", "running_var")
            normalise(recorder, labels, {r: f"{path}.{r}" for r in roles if getattr(op, r) is not None})
        elif isinstance(op, Scale):
            recorder.add_slice(f"{path}.weight", 0, labels)
    return labels


def _rep_block(recorder: Recorder, name: str, block: RepBlock, x: Tensor):
    """Only the outer channels of a block can go: those inside are of no layer. It costs what the merged convolution costs."""
    mark = recorder.mark_of(x)
    inputs = recorder.channels.along(mark.labels, 1)
    if inputs is None:
        raise TraceError(f"{type(block).__name__} {name!r} is given a map whose channels are not along dimension 1")
    norms = set(recorder.trace.norms)
    if block.deployed:
        ends = [_run_chain(recorder, name, [("reparam_conv", block.reparam_conv)], inputs)]
    else:
        chains = [(member(name, f"branches.{key}"), chain) for key, chain in block.branches.items()]
        ends = [_run_chain(recorder, path, list(chain.named_children()), inputs) for path, chain in chains]
    labels = ends[0]
    for other in ends[1:]:
        recorder.channels.tie(labels, other, f"the branches of {name!r}")
    if hasattr(block, "post_bn"):
        labels = _run_chain(recorder, name, [("post_bn", block.post_bn)], labels)
    for tensor, dims in _slices_inside(recorder, name):
        if not mark.zero and 1 in dims:
            recorder.trace.masked_inputs.add((tensor, 1))

    out_shape = _out_shape(block, x, len(labels))
    act = block.act
    labels_map = spread(labels, 1, out_shape)
    for path, part in act.named_modules(prefix=member(name, "act")):
        if isinstance(part, nn.PReLU) and part.weight.numel() > 1:
            recorder.add_slice(f"{path}.weight", 0, labels)
        elif any(p.numel() > 1 for p in part.parameters(recurse=False)):
            what = f"goes through {type(part).__name__} in {name!r}, whose parameters pruning cannot follow"
            recorder.channels.freeze(labels, f"{what}: take another activation")
    parameter = next(block.parameters())
    tried = act(torch.zeros(1, out_shape[1], 1, 1, dtype=parameter.dtype, device=parameter.device))
    zero = bool((tried == 0).all()) and recorder.makes_zero(name)

    groupwise = goes_by_group(recorder, inputs.view(block.groups, -1))
    taps = block.kernel_size[0] * block.kernel_size[1]
    layer = Layer(name, "block", labels, inputs, None, groupwise, block.groups, taps)
    recorder.trace.layers[name] = layer
    parameters = tuple(member(name, key) for key, _ in block.named_parameters() if not key.startswith("act."))
    recorder.trace.block_parameters[name] = parameters
    for norm in set(recorder.trace.norms) - norms:
        if norm.removeprefix(member(name, "")) not in _output_norms(block):
            del recorder.trace.norms[norm]
    positions = out_shape[0] * out_shape[2] * out_shape[3] * taps
    if groupwise:
        width = len(layer.inputs_per_group)
        recorder.add_cost([labels], lambda kept: positions * width * kept)
    else:
        recorder.add_cost([labels, layer.inputs_per_group], lambda kept, read: positions * kept * read)
    return torch.empty(out_shape, dtype=x.dtype, device="meta"), [Mark(labels_map, zero)]


def _slices_inside(recorder: Recorder, name: str):
    return [(tensor, dims) for tensor, dims in recorder.trace.slices.items() if tensor.startswith(member(name, ""))]


def _output_norms(block: RepBlock) -> set[str]:
    ends = {id(bn) for bn in block.output_bns()}
    return {key for key, module in block.named_modules() if id(module) in ends}


def _out_shape(block: RepBlock, x: Tensor, channels: int) -> tuple[int, ...]:
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], block.padding, block.dilation, block.kernel_size, block.stride)
    ]
    return (x.shape[0], channels, *sides)


def _stream(recorder: Recorder, name: str, neck: BilinearPooling, feats: Sequence[Tensor], stream: int):
    x = feats[neck.in_index[stream]]
    mark = recorder.mark_of(x)
    dim = {"NCHW": 1, "NHWC": 3, "NLC": 2}[neck.layout]
    labels = recorder.channels.along(mark.labels, dim)
    if labels is None:
        raise TraceError(f"{type(neck).__name__} {name!r} is given a map that is not {neck.layout}")
    given, positions = labels, x.numel() // (x.shape[0] * x.shape[dim])
    if hasattr(neck, path := ("projection", "projection_second")[stream]):
        layer = member(name, f"{path}.conv")
        inputs = labels
        labels = _run_chain(recorder, member(name, path), [("conv", getattr(neck, path).conv)], labels)
        recorder.note_input(f"{layer}.weight", 1, mark)
        mark = Mark(labels, recorder.makes_zero(layer))
        labels = _run_chain(recorder, member(name, path), [("bn", getattr(neck, path).bn)], labels)
        recorder.trace.layers[layer] = Layer(layer, "conv", labels, inputs, f"{layer}.weight")
        recorder.add_cost([labels, inputs], lambda kept, read: x.shape[0] * positions * kept * read)
    if not mark.zero:
        what = f"feeds {name!r} through a step that makes no zero of a removed channel"
        recorder.channels.freeze(labels, f"{what}: end it with a ReLU")
    return given, labels, positions


def _bilinear_pooling(recorder: Recorder, name: str, neck: BilinearPooling, feats: Sequence[Tensor]):
    """A kept channel keeps its row and its column of the products; tables of compact forms lose its entries."""
    streams = [_stream(recorder, name, neck, feats, index) for index in range(len(neck.in_index))]
    given, pooled = tuple(s[0] for s in streams), tuple(s[1] for s in streams)
    first, second, positions = pooled[0], pooled[-1], streams[0][2]
    pool, batch = neck.pool, feats[neck.in_index[0]].shape[0]
    out = torch.empty(batch, pool.out_channels, dtype=feats[neck.in_index[0]].dtype, device="meta")
    mark = fixed_like(out)
    if isinstance(pool, Full):
        labels = recorder.channels.product(first.repeat_interleave(len(second)), second.repeat(len(first)))
        mark = Mark(spread(labels, 1, out.shape))
    elif isinstance(pool, Triangle):
        place = triangle_index(len(first))
        labels = recorder.channels.product(first[place // len(first)], first[place % len(first)])
        mark = Mark(spread(labels, 1, out.shape))
    elif isinstance(pool, LowRank):
        for factor, labels in zip(("factor1", "factor2"), (first, second)):
            recorder.add_slice(member(name, f"pool.{factor}"), 0, labels)
    elif not isinstance(pool, (TensorSketch, RandomMaclaurin)):
        what = f"feeds {type(pool).__name__} in {name!r}, which pruning cannot follow"
        recorder.channels.freeze(torch.cat([first, second]), f"{what}: take another pooling")
    recorder.add_cost([first, second], lambda one, two: batch * _pool_macs(pool, one, two, positions, neck.symmetric))
    recorder.trace.pools[name] = (given, pooled)
    return (out,), [mark]


def _pool_macs(pool: nn.Module, one: int, two: int, positions: int, symmetric: bool) -> int:
    """Matrix products of one image, as the pool's forward runs them on ``one`` and ``two`` channels."""
    products = one * two * positions
    if isinstance(pool, ISqrtCov):
        return products + (3 * pool.iterations - 3 if pool.iterations > 1 else 1) * one**3
    if isinstance(pool, LowRank):
        return (one + two) * pool.out_channels * positions
    if isinstance(pool, RandomMaclaurin):
        if two <= positions:
            return products + pool.out_channels * one * two
        return (one + two) * pool.out_channels * positions
    return products
