"""Rules for layers: convolutions, linear layers and normalisations."""

from torch import Tensor

from rep_plugin.pruning.tracing.graph import Layer, Mark, owner_of
from rep_plugin.pruning.tracing.labels import FIXED
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules.registry import goes_past, rule, spread


def goes_by_group(recorder: Recorder, per_group: Tensor) -> bool:
    """Return whether a convolution's groups are kept or removed as a whole: a depthwise one's are.

    Args:
        recorder: Of the trace.
        per_group: Labels of the inputs (groups, width).

    Returns:
        True where they are.
    """
    groups, width = per_group.shape
    if groups == 1 or width == 1:
        return groups > 1
    return not recorder.channels.varies(per_group, 1) and recorder.channels.varies(per_group, 0)


def convolve(
    recorder: Recorder, inputs: Tensor, weight: str, bias: str | None, groups: int, shape
) -> tuple[Tensor, bool]:
    """Follow channels through a convolution.

    A grouped convolution keeps or loses whole groups, or keeps its groups and loses as many channels in each: the labels
    of its inputs are then (groups, I / groups).

    Args:
        recorder: Of the trace.
        inputs: Labels of the inputs (I,).
        weight: Name of the kernel.
        bias: Name of the bias.
        groups: Of the convolution.
        shape: Of the kernel.

    Returns:
        The labels of the outputs (O,), and whether whole groups are kept or removed.
    """
    outs, width = shape[:2]
    per_group = inputs.view(groups, width)
    groupwise = goes_by_group(recorder, per_group)
    if groupwise:
        recorder.trace.groupwise.add(weight)
        labels = per_group[:, 0].repeat_interleave(outs // groups)
    else:
        recorder.channels.balance(per_group)
        recorder.add_slice(weight, 1, per_group if groups > 1 else inputs)
        labels = recorder.trace.slices[weight].get(0)
        if labels is None:
            labels = recorder.channels.fresh(outs)
            recorder.channels.balance(labels.view(groups, -1))
    recorder.add_slice(weight, 0, labels, maker=True)
    if bias is not None:
        recorder.add_slice(bias, 0, labels, maker=True)
    return labels, groupwise


def _for_each_head(
    recorder: Recorder, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, dims: list[int]
) -> Mark | None:
    """A layer that is applied to each head alike keeps its own channels; heads go past it."""
    mark = recorder.mark_of(input)
    if recorder.is_open(input):
        for dim in dims:
            recorder.channels.tie_along(mark.labels, dim, f"a layer on each head {recorder.place()}")
    labels = goes_past(recorder, mark.labels, dims)
    if labels is None or weight is None:
        return None
    what = f"a layer on each head {recorder.place()}"
    if not (recorder.keep_whole(weight, what) and recorder.keep_whole(bias, what)):
        return None
    dim = recorder.channels.varying(labels)[0]
    along, macs = recorder.channels.along(labels, dim), out.numel() * weight[0].numel()
    if along is None:
        return None
    recorder.add_cost([along], lambda kept: macs * kept // len(along))
    return Mark(labels.expand(out.shape), mark.zero and bias is None)


@rule("conv1d", "conv2d", "conv3d", keeps_open=True)
def _conv(recorder, out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if input.dim() == weight.dim():
        past = _for_each_head(recorder, out, input, weight, bias, list(range(1, input.dim())))
        if past is not None:
            return past
    mark, name = recorder.mark_of(input), recorder.name_of(weight)
    inputs = recorder.channels.along(mark.labels, 1)
    if inputs is None or (bias is not None and recorder.name_of(bias) is None) or input.dim() != weight.dim():
        return None
    if name is None:
        return _computed_kernel(recorder, out, input, weight, bias, 1, groups)
    labels, groupwise = convolve(recorder, inputs, name, recorder.name_of(bias), groups, weight.shape)
    if not groupwise:
        recorder.note_input(name, 1, mark)
    layer = owner_of(name)
    positions, taps = out.numel() // out.shape[1], weight[0, 0].numel()
    recorder.trace.layers.setdefault(layer, Layer(layer, "conv", labels, inputs, name, groupwise, groups, taps))
    if groupwise:
        width = weight.shape[1]
        recorder.add_cost([labels], lambda kept: positions * taps * width * kept)
    else:
        recorder.add_cost([labels, inputs[: weight.shape[1]]], lambda kept, read: positions * taps * kept * read)
    recorder.note_conv_output(layer, out)
    return Mark(spread(labels, 1, out.shape), recorder.makes_zero(layer))


def _computed_kernel(
    recorder: Recorder, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, dim: int, groups: int = 1
) -> Mark | None:
    """A layer whose kernel is no parameter: computed from one (its inputs stay), or one filter for every channel."""
    mark, kernel = recorder.mark_of(input), recorder.mark_of(weight)
    macs = out.numel() // out.shape[dim] * weight[0].numel()
    one_for_all = groups == len(weight) == input.shape[dim] and weight.stride(0) == 0 and bias is None
    if one_for_all or not recorder.channels.varying(kernel.labels):
        labels, repeated = recorder.channels.along(mark.labels, dim), recorder.channels.along(kernel.labels, 0)
        if not one_for_all or labels is None or repeated is None:
            return None
        if recorder.channels.varies(kernel.labels, 0):  # repeated as often as there are channels
            recorder.channels.tie(labels, repeated, f"a kernel for each channel {recorder.place()}")
        recorder.add_cost([labels], lambda kept: macs * kept)
        return Mark(spread(labels, dim, out.shape), mark.zero)
    labels = recorder.channels.along(kernel.labels, 0)
    layer = None if labels is None else recorder.computed.get(int(labels[0]))
    if labels is None or layer is None or groups > 1:
        return None
    inputs = recorder.channels.along(mark.labels, dim)
    reason = f"feeds {layer!r}, whose kernel is computed by all of its inputs: take that computation off to prune them"
    recorder.channels.freeze(inputs, reason)
    if bias is not None:
        recorder.add_slice(recorder.name_of(bias), 0, labels, maker=True)
    kind = "linear" if weight.dim() == 2 else "conv"
    recorder.trace.layers.setdefault(layer, Layer(layer, kind, labels, inputs))
    recorder.add_cost([labels], lambda kept: macs * kept)
    return Mark(spread(labels, dim, out.shape), False)


@rule("_weight_norm")
def _weight_norm(recorder, out, v, g, dim=0):
    labels, gains = recorder.mark_of(v).labels, recorder.mark_of(g).labels
    if dim % v.dim() != 0 or recorder.channels.along(labels, 0) is None or g.shape[0] != v.shape[0]:
        return None
    recorder.channels.tie(labels.narrow(1, 0, 1).flatten(1)[:, 0], gains.flatten(1)[:, 0], "a weight norm")
    return Mark(labels, False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    recorder, out, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    return _dense(recorder, out, input, weight, bias, "conv_transpose", 1, 1) if groups == 1 else None


@rule("linear", keeps_open=True)
def _linear(recorder, out, input, weight, bias=None):
    past = _for_each_head(recorder, out, input, weight, bias, [-1])
    if past is not None:
        return past
    return _dense(recorder, out, input, weight, bias, "linear", -1, 0)


def _dense(
    recorder: Recorder, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, kind: str, dim: int, rows: int
) -> Mark | None:
    """A layer of which every output reads every input: channels along ``dim``, outputs along ``rows`` of its kernel."""
    mark, name, columns = recorder.mark_of(input), recorder.name_of(weight), 1 - rows
    inputs = recorder.channels.along(mark.labels, dim)
    joined = None  # a bias that is put together of several
    if bias is not None and recorder.name_of(bias) is None:
        joined, bias = recorder.channels.along(recorder.mark_of(bias).labels, 0), None
        if joined is None or name is None:
            return None
    if inputs is None:
        return None
    if name is None:
        return (
            None if kind == "conv_transpose" else _computed_kernel(recorder, out, input, weight, bias, dim % out.dim())
        )
    recorder.add_slice(name, columns, inputs)
    recorder.note_input(name, columns, mark)
    labels = recorder.trace.slices[name].get(rows)
    labels = recorder.channels.fresh(weight.shape[rows]) if labels is None else labels
    recorder.add_slice(name, rows, labels, maker=True)
    if joined is not None:
        known = joined != FIXED  # zeros that a forward makes, or keeps, for what has no bias
        recorder.channels.tie(labels[known], joined[known], f"a joined bias {recorder.place()}")
    if bias is not None:
        recorder.add_slice(recorder.name_of(bias), 0, labels, maker=True)
    layer = owner_of(name)
    recorder.trace.layers.setdefault(layer, Layer(layer, kind, labels, inputs, name))
    macs = input.numel() // input.shape[dim] * weight[0, 0].numel()
    recorder.add_cost([labels, inputs], lambda kept, read: macs * kept * read)
    return Mark(spread(labels, dim, out.shape), recorder.makes_zero(layer))


def normalise(recorder: Recorder, labels: Tensor, names: dict[str, str | None]) -> None:
    """Follow channels through a normalisation of each channel.

    Args:
        recorder: Of the trace.
        labels: Of the channels (C,).
        names: Of its ``weight``, ``bias``, ``running_mean`` and ``running_var``.
    """
    for role, name in names.items():
        if name is not None:
            recorder.add_slice(name, 0, labels, maker=role in ("weight", "bias"))
    if names.get("weight") is not None and names.get("running_var") is not None:
        recorder.trace.norms.setdefault(owner_of(names["weight"]), labels)


@rule("batch_norm", "instance_norm")
def _batch_norm(
    recorder, out, input, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    use_input_stats=True,
):  # fmt: skip
    mark = recorder.mark_of(input)
    labels = recorder.channels.along(mark.labels, 1)
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    given = {role: tensor for role, tensor in given.items() if tensor is not None}
    if labels is None:
        return None
    for role in [role for role, tensor in given.items() if recorder.name_of(tensor) is None]:  # computed, as a gain
        recorder.channels.tie(labels, recorder.mark_of(given.pop(role)).labels, f"a batch norm {recorder.place()}")
    normalise(recorder, labels, {role: recorder.name_of(tensor) for role, tensor in given.items()})
    name = owner_of(recorder.name_of(next(iter(given.values())))) if given else ""
    recorder.note_norm_input(name, input)
    affine = "weight" in given and "bias" in given and recorder.makes_zero(name)
    return Mark(spread(labels, 1, out.shape), affine or (mark.zero and running_mean is None and bias is None))


@rule("prelu")
def _prelu(recorder, out, input, weight):
    mark = recorder.mark_of(input)
    labels = recorder.channels.along(mark.labels, 1) if input.dim() > 1 else None
    if weight.numel() > 1:
        if labels is None or recorder.name_of(weight) is None:
            return None
        recorder.add_slice(recorder.name_of(weight), 0, labels)
    return mark


@rule("layer_norm", "rms_norm", keeps_open=True)
def _layer_norm(recorder, out, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """One of the channels, with weights, is one of those that stay: the masked model has the same (:class:`KeptNorms`)."""
    labels = recorder.mark_of(input).labels
    inside = list(range(input.dim() - len(normalized_shape), input.dim()))
    if recorder.is_open(input):
        for dim in inside:
            recorder.channels.tie_along(labels, dim, f"a norm of each head {recorder.place()}")
    if weight is not None and goes_past(recorder, labels, inside) is not None:
        what = f"a norm of each head {recorder.place()}"
        if not (recorder.keep_whole(weight, what) and recorder.keep_whole(bias, what)):
            return None
        return Mark(labels, False)
    channels, name = recorder.channels.along(labels, -1), recorder.name_of(weight)
    named = name is not None and (not isinstance(bias, Tensor) or recorder.name_of(bias) is not None)
    if len(normalized_shape) == 1 and named and channels is not None and recorder.makers is None:
        recorder.add_slice(name, 0, channels, maker=True)
        if isinstance(bias, Tensor):
            recorder.add_slice(recorder.name_of(bias), 0, channels, maker=True)
        recorder.trace.layer_norms[name] = channels
        what = f"goes into a norm over channels {recorder.place()}, where two equal channels are not one"
        recorder.trace.counted.append((channels, f"{what}: PruneHook prunes it"))
        return Mark(spread(channels, -1, out.shape), True)
    for dim in range(input.dim() - len(normalized_shape), input.dim()):
        recorder.channels.tie_along(labels, dim, f"a layer norm over channels {recorder.place()}")
    return Mark(labels, False)


@rule("group_norm")
def _group_norm(recorder, out, input, num_groups, weight=None, bias=None, eps=1e-5):
    """With weights, all groups keep as many channels, and normalise those: the masked model does the same."""
    labels = recorder.mark_of(input).labels
    channels, names = recorder.channels.along(labels, 1), [recorder.name_of(tensor) for tensor in (weight, bias)]
    if channels is None or names[0] is None or (bias is not None and names[1] is None) or recorder.makers is not None:
        recorder.channels.tie_along(labels, 1, f"a group norm over channels {recorder.place()}")
        return Mark(labels, False)
    recorder.channels.balance(channels.view(num_groups, -1))
    for name in filter(None, names):
        recorder.add_slice(name, 0, channels, maker=True)
    recorder.trace.group_norms[names[0]] = channels
    what = f"goes into a norm over channels {recorder.place()}, where two equal channels are not one"
    recorder.trace.counted.append((channels, f"{what}: PruneHook prunes it"))
    return Mark(spread(channels, 1, out.shape), True)


@rule("softmax", "log_softmax", keeps_open=True)
def _softmax(recorder, out, input, dim=None, _stacklevel=3, dtype=None):
    labels = recorder.mark_of(input).labels
    if dim is None:
        return None
    recorder.channels.tie_along(labels, dim, f"a softmax over channels {recorder.place()}")
    return Mark(labels, False)


@rule("normalize", keeps_open=True)
def _normalize(recorder, made, input, p=2.0, dim=1, eps=1e-12, out=None):  # torch hands `out` over by name
    mark = recorder.mark_of(input)
    if not mark.zero:  # zeros add nothing to a norm
        recorder.channels.tie_along(mark.labels, dim, f"a norm over channels {recorder.place()}")
    elif recorder.channels.varies(mark.labels, dim):
        what = f"goes into a norm over channels {recorder.place()}, where two equal channels are not one"
        recorder.trace.counted.append((mark.labels, f"{what}: PruneHook prunes it"))
    return mark
