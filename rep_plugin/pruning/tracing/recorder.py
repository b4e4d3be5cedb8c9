"""Records of a traced model: which channels every map and every parameter follows."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CodeType

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from rep_plugin.errors import TraceError
from rep_plugin.measure.branches import place_of
from rep_plugin.pruning.tracing.graph import Cost, Mark, Trace, member, named_tensors
from rep_plugin.pruning.tracing.labels import FIXED, compress
from rep_plugin.pruning.tracing.numbers import Place


def _kernels_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of tensors that a layer's kernel is, or may be computed from, and of the layer."""
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and not isinstance(module, _ConvTransposeNd):
            inside = (key for key, tensor in named_tensors(module).items() if tensor.dim() > 1)
            yield from ((member(name, key), name) for key in inside)


class Recorder:
    """Keeps the marks of every map and writes the trace. Rules call it; the tracer owns it.

    Args:
        model: On which the rules are run.
        shape: Of the example input.
        makers: The only layers and norms that are set to zero for removed channels (default: all).

    Attributes:
        trace: The trace so far.
        channels: The labels of the trace, and which of them are tied or frozen.
        function: The torch function that a rule is asked about.
        function_name: Its plain name.
        count_macs: Returns its multiply-adds.
        caller: The code of the function that calls the model.
        used_names: Names of the parameters and buffers that the model has used.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], makers: Collection[str] | None = None):
        self.trace = Trace(shape)
        self.channels = self.trace.channels
        self.makers = makers
        self.function: Callable | None = None
        self.function_name = ""
        self.count_macs: Callable[[], int] = lambda: 0
        self.caller: CodeType | None = None
        self._modules = {id(module): name for name, module in model.named_modules()}
        self.names = {id(t): name for name, t in named_tensors(model).items()}
        self.trace.sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.used_names: set[str] = set()
        # Kernels of convolutions and linear layers, and what they are computed from: {name: layer}.
        self._kernels = dict(_kernels_of(model))
        self.computed: dict[int, str] = {}  # first label of the rows of a kernel in arithmetic: its layer
        self._unlabelled: set[str] = set()  # parameters in arithmetic whose channels are not known
        self._marks: dict[int, tuple[Mark, Tensor]] = {}  # the tensor is held: its id must not be used again
        self._reads: Counter[int] = Counter()  # of a map, by id
        self._made: dict[str, set[int]] = {}  # by a convolution: ids of maps
        self._normed: dict[str, set[int]] = {}  # by a batch norm
        self.norm_maps: set[int] = set()  # ids of maps that are norms of each channel
        self.means = 0  # of these, over channels
        self._open: dict[int, str] = {}  # maps that are no box yet, and the place of the view
        self._numbers: dict[Place, list[tuple[Tensor, int]]] = {}  # labels of maps, and along which dimension

    def place(self) -> str:
        """Return which part of the model is running, as ``in 'layer1.0' (timm/models/resnet.py:210)``."""
        return f"in {place_of(self._modules, self.caller)}"

    def operation(self) -> str:
        """Return the function that a rule is asked about, in words, and its place."""
        name = self.function_name.strip("_")
        name = {"getitem": "indexing", "setitem": "assignment by index"}.get(name, name)
        name = name[1:] if name[1:] in ("add", "sub", "mul", "truediv") else name
        return f"{name} {self.place()}"

    def is_tracked(self, tensor: object) -> bool:
        """Return whether this is a map of the traced run."""
        return isinstance(tensor, Tensor) and tensor.is_meta

    def makes_zero(self, name: str) -> bool:
        """Return whether a layer, or a norm, is set to zero for removed channels: by masking all are."""
        return self.makers is None or name in self.makers

    def note_conv_output(self, conv: str, tensor: Tensor) -> None:
        """Note that the convolution ``conv`` made a map."""
        self._made.setdefault(conv, set()).add(id(tensor))

    def note_norm_input(self, norm: str, tensor: Tensor) -> None:
        """Note that the batch norm ``norm`` reads a map."""
        self._normed.setdefault(norm, set()).add(id(tensor))

    def set_mark(self, tensor: Tensor, mark: Mark) -> None:
        """Note what is known of a map."""
        assert mark.labels.shape == tensor.shape, (mark.labels.shape, tensor.shape)
        self._marks[id(tensor)] = (mark, tensor)

    def known_labels(self, tensor: object) -> Tensor | None:
        """Return the labels of a map; None for anything else."""
        known = self._marks.get(id(tensor)) if self.is_tracked(tensor) else None
        return None if known is None else known[0].labels

    def leave_open(self, tensor: Tensor) -> None:
        """Note that channels may vary along several dimensions of a map, as heads and what is in a head."""
        labels = self.mark_of(tensor).labels
        several = sum(size > 1 and stride != 0 for size, stride in zip(labels.shape, labels.stride())) > 1  # cheap
        if several and len(self.channels.varying(labels)) > 1:
            self._open[id(tensor)] = self.place()

    def is_open(self, tensor: Tensor) -> bool:
        """Return whether channels vary along several dimensions of a map."""
        return id(tensor) in self._open

    def close(self, tensor: Tensor) -> None:
        """Let a map be a box whatever goes: where channels vary along several dimensions, only the longest gives way."""
        place = self._open.pop(id(tensor), None)
        if place is not None:
            self.make_box(self._marks[id(tensor)][0].labels, f"a reshape {place}")

    def make_box(self, labels: Tensor, what: str) -> Tensor:
        """Tie labels along all varying dimensions but the longest.

        Args:
            labels: Of a map.
            what: The operation that needs it.

        Returns:
            The labels, compressed.
        """
        labels = compress(labels)
        dims = self.channels.varying(labels)
        if len(dims) > 1:
            longest = max(dims, key=lambda d: labels.shape[d])
            for dim in dims:
                if dim != longest:
                    self.channels.tie_along(labels, dim, what)
        return labels

    def note_number(self, place: Place, labels: Tensor, dim: int) -> None:
        """Note that a number of the model is the length of a map along a dimension.

        Args:
            place: Of the number.
            labels: Of the map.
            dim: The dimension.
        """
        self._numbers.setdefault(place, []).append((labels, dim))

    def channels_of(self, place: Place) -> list[Tensor]:
        """Return the channels whose number stands at a place of the model, for each of its uses."""
        uses = [self.channels.along(*use) for use in self._numbers.get(place, ()) if self.channels.varies(*use)]
        return [labels for labels in uses if labels is not None]

    def finish(self) -> None:
        """Close what is left open, and write which numbers of the model follow which channels."""
        for _, tensor in [self._marks[id_] for id_ in self._open]:
            self.close(tensor)
        for place in self._numbers:
            uses = self.channels_of(place)
            for other in uses[1:]:
                if len(other) == len(uses[0]):
                    self.channels.tie(uses[0], other, f"{place[1]!r} of {place[0]!r}, the number of both")
            if uses:
                self.trace.numbers[place] = uses[0]
        self.pair_norms()

    def mark_of(self, tensor: Tensor) -> Mark:
        """Return what is known of a map, or of a parameter that is used like one."""
        if (known := self._marks.get(id(tensor))) is not None:
            return known[0]
        if (name := self.names.get(id(tensor))) is not None:
            return self._mark_parameter(tensor, name)
        if not tensor.is_meta:
            return Mark(torch.tensor(FIXED).expand(tensor.shape), False)
        raise TraceError(f"{self.place()} a map appears that no torch function made: it cannot be followed")

    def meet(self, parameter: Tensor, other: Tensor) -> None:
        """Let a parameter of several dimensions, as a position embedding, follow the channels of the map that it meets."""
        name = self.names.get(id(parameter))
        if name is None or id(parameter) in self._marks or name in self.trace.slices or not other.is_meta:
            return
        if sum(size > 1 for size in parameter.shape) < 2:
            return
        labels = self.mark_of(other).labels
        varying = self.channels.varying(labels)
        dim = varying[0] - other.dim() + parameter.dim() if len(varying) == 1 else -1
        if dim < 0 or parameter.shape[dim] != other.shape[varying[0]]:
            return
        self._mark_along(parameter, name, dim)

    def mark_table(self, parameter: Tensor, dim: int) -> None:
        """Let a parameter whose rows are looked up follow channels along its other dimension.

        Args:
            parameter: Of two long dimensions.
            dim: Along which it is looked up.
        """
        name = self.names.get(id(parameter))
        others = [other for other, size in enumerate(parameter.shape) if size > 1 and other != dim]
        if name is not None and id(parameter) not in self._marks and name not in self.trace.slices and len(others) == 1:
            self._mark_along(parameter, name, others[0])

    def keep_whole(self, parameter: Tensor | None, what: str) -> bool:
        """Note that a parameter keeps its shape; return False where it is already known to follow channels.

        Args:
            parameter: Any tensor.
            what: Uses it, for the reason.
        """
        name = self.names.get(id(parameter))
        if name is None:
            return parameter is None or not self.channels.varying(self.mark_of(parameter).labels)
        if name in self.trace.slices:
            for labels in self.trace.slices[name].values():
                self.channels.freeze(labels, f"is tied to {name!r}, which {what} needs whole")
        self._unlabelled.add(name)
        return True

    def _mark_along(self, tensor: Tensor, name: str, dim: int) -> None:
        view = [1] * tensor.dim()
        view[dim] = -1
        labels = self.channels.fresh(tensor.shape[dim])
        self.add_slice(name, dim, labels, maker=True)
        self._marks[id(tensor)] = (Mark(labels.view(view).expand(tensor.shape), self.makers is None), tensor)

    def _mark_parameter(self, tensor: Tensor, name: str) -> Mark:
        """A parameter or buffer in arithmetic: its one dimension that is longer than 1 may follow channels.

        Of a kernel that is computed with (weight standardisation, weight norm) the outputs may.
        """
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        mark = Mark(torch.tensor(FIXED).expand(tensor.shape), False)
        tokens = tensor.dim() == 3 and long == [1, 2]  # position embeddings (1, N, C)
        if (len(long) == 1 or tokens) and name not in self.trace.slices and name not in self._kernels:
            self._mark_along(tensor, name, long[-1])
            return self._marks[id(tensor)][0]
        if 0 in long and name in self._kernels and name not in self.trace.slices:
            labels = self.channels.fresh(tensor.shape[0])
            # Nothing is set to zero: zero over its own norm is no number. What reads these outputs is masked instead.
            mark = Mark(labels.view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape), False)
            self.computed[int(labels[0])] = self._kernels[name]
            self.add_slice(name, 0, labels)
        elif long:
            self._unlabelled.add(name)
            for labels in self.trace.slices.get(name, {}).values():
                self.channels.freeze(labels, self._used_twice(name))
        self._marks[id(tensor)] = (mark, tensor)
        return mark

    @staticmethod
    def _used_twice(name: str) -> str:
        return f"is tied to {name!r}, which the model also uses outside of its layer: give the layer a parameter of its own"

    def name_of(self, tensor: object) -> str | None:
        """Return the name of a parameter or buffer, None for anything else."""
        return self.names.get(id(tensor))

    def add_slice(self, name: str, dim: int, labels: Tensor, maker: bool = False) -> None:
        """Note that a dimension of a tensor follows channels.

        Args:
            name: Of the parameter or buffer.
            dim: Its dimension.
            labels: Of the channels, (C,), or (groups, C / groups) for the inputs of a grouped kernel.
            maker: Where the tensor is set to zero, its channels are zero.
        """
        if maker:
            self.trace.makers.add((name, dim))
        if name in self._unlabelled:
            self.channels.freeze(labels, self._used_twice(name))
        dims = self.trace.slices.setdefault(name, {})
        if dim in dims:
            self.channels.tie(dims[dim], labels, f"the second use of {name!r}")
        else:
            dims[dim] = labels

    def note_input(self, name: str, dim: int, mark: Mark) -> None:
        """Note that a layer reads a map; what is not zero there has to be masked at the layer.

        Args:
            name: Of the layer's kernel.
            dim: The dimension of its inputs.
            mark: Of the map.
        """
        if not mark.zero:
            self.trace.masked_inputs.add((name, dim))

    def add_cost(self, labels: Iterable[Tensor], count: Callable[..., int]) -> None:
        """Add multiply-adds.

        Args:
            labels: Of the channels that they depend on.
            count: Returns them for the numbers that stay of each of ``labels``.
        """
        self.trace.costs.append(Cost(tuple(labels), count))

    def freeze_maps(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Freeze the channels of all these tensors.

        Args:
            what: The function without a rule, for the reason.
            tensors: Its arguments.
        """
        reason = (
            f"goes through {what}, which pruning cannot follow: rewrite that step, or plan the parts around it alone"
        )
        for tensor in tensors:
            if self.is_tracked(tensor) or self.name_of(tensor) is not None:
                self.channels.freeze(self.mark_of(tensor).labels, reason)

    def note_reads(self, tensors: Iterable[Tensor]) -> None:
        """Note that a function reads these maps."""
        self._reads.update(id(t) for t in tensors if t.is_meta)

    def holds_unread(self) -> bool:
        """Whether a layer made a map that nothing has read: another mode may."""
        return any(not self._reads[id_] for maps in self._made.values() for id_ in maps)

    def pair_norms(self) -> None:
        """Write which batch norm alone reads what a convolution makes."""
        for norm, maps in self._normed.items():
            conv = next((name for name, made in self._made.items() if made == maps), None)
            if conv is not None and all(self._reads[id_] == 1 for id_ in maps):
                self.trace.conv_of_norm[norm] = conv
