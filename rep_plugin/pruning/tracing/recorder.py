"""What rules tell of a traced model: which channels every map and every parameter follows."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from rep_plugin.errors import TraceError
from rep_plugin.pruning.tracing.graph import Cost, Mark, Trace, where
from rep_plugin.pruning.tracing.labels import FIXED


class Recorder:
    """Keeps the marks of every map and writes the trace. Rules talk to it; the tracer owns it.

    Attributes:
        trace: what was found so far.
        channels: the labels of the trace, and which of them are tied or frozen.
        function: the torch function that a rule is asked about.
        function_name: its plain name.
        seen: names of the parameters and buffers that the model has used.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], makers: Collection[str] | None = None):
        self.trace = Trace(shape)
        self.channels = self.trace.channels
        self.makers = makers
        self.function: Callable | None = None
        self.function_name = ""
        self.names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.trace.sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.seen: set[str] = set()
        self._loose: set[str] = set()  # parameters in arithmetic whose channels are not known
        self._marks: dict[int, tuple[Mark, Tensor]] = {}  # the tensor is held: its id must not be used again
        self._reads: Counter[int] = Counter()  # of a map, by id
        self._made: dict[str, set[int]] = {}  # by a convolution: ids of maps
        self._normed: dict[str, set[int]] = {}  # by a batch norm

    def is_tracked(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.is_meta

    def makes_zero(self, name: str) -> bool:
        """Return whether a layer, or a norm, is set to zero for removed channels: by masking all are."""
        return self.makers is None or name in self.makers

    def made_by(self, conv: str, tensor: Tensor) -> None:
        """Note that a convolution made a map."""
        self._made.setdefault(conv, set()).add(id(tensor))

    def normed_by(self, norm: str, tensor: Tensor) -> None:
        """Note that a batch norm reads a map."""
        self._normed.setdefault(norm, set()).add(id(tensor))

    def mark(self, tensor: Tensor, mark: Mark) -> None:
        assert mark.labels.shape == tensor.shape, (mark.labels.shape, tensor.shape)
        self._marks[id(tensor)] = (mark, tensor)

    def of(self, tensor: Tensor) -> Mark:
        """Return what is known of a map, or of a parameter that is used like one."""
        if (found := self._marks.get(id(tensor))) is not None:
            return found[0]
        if (name := self.names.get(id(tensor))) is not None:
            return self._mark_parameter(tensor, name)
        if not tensor.is_meta:
            return Mark(torch.tensor(FIXED).expand(tensor.shape), False)
        raise TraceError(f"at {where()} a map appears that no torch function made: it cannot be followed")

    def _mark_parameter(self, tensor: Tensor, name: str) -> Mark:
        """A parameter or buffer in arithmetic: its one dimension that is longer than 1 may follow channels."""
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        mark = Mark(torch.tensor(FIXED).expand(tensor.shape), False)
        if len(long) == 1 and name not in self.trace.cuts:
            (dim,) = long
            view = [1] * tensor.dim()
            view[dim] = -1
            labels = self.channels.fresh(tensor.shape[dim])
            mark = Mark(labels.view(view), self.makers is None)
            self.cut(name, dim, labels, maker=True)
        elif long:
            self._loose.add(name)
            for labels in self.trace.cuts.get(name, {}).values():
                self.channels.freeze(labels, f"{name} is also used in arithmetic at {where()}")
        self._marks[id(tensor)] = (mark, tensor)
        return mark

    def name(self, tensor: object) -> str | None:
        """Return the name of a parameter or buffer, None for anything else."""
        return self.names.get(id(tensor))

    def cut(self, name: str, dim: int, labels: Tensor, maker: bool = False) -> None:
        """Say that a dimension of a tensor follows channels; ``maker``: set to zero, it makes them zero."""
        if maker:
            self.trace.makers.add((name, dim))
        if name in self._loose:
            self.channels.freeze(labels, f"{name} is also used in arithmetic")
        dims = self.trace.cuts.setdefault(name, {})
        if dim in dims:
            self.channels.tie(dims[dim], labels, f"a second use of {name}")
        else:
            dims[dim] = labels

    def see(self, name: str, dim: int, mark: Mark) -> None:
        """Note that a layer reads a map; what is not zero there has to be masked at the reader."""
        if not mark.zero:
            self.trace.masked_inputs.add((name, dim))

    def cost(self, labels: Iterable[Tensor], count: Callable[..., int]) -> None:
        self.trace.costs.append(Cost(tuple(labels), count))

    def give_up(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Freeze the channels of all these tensors."""
        for tensor in tensors:
            if self.is_tracked(tensor) or self.name(tensor) is not None:
                self.channels.freeze(self.of(tensor).labels, f"no rule for {what}")

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Note that a function reads these maps."""
        self._reads.update(id(t) for t in tensors if t.is_meta)

    def pair_norms(self) -> None:
        """Write which batch norm alone reads what a convolution makes."""
        for norm, maps in self._normed.items():
            conv = next((name for name, made in self._made.items() if made == maps), None)
            if conv is not None and all(self._reads[id_] == 1 for id_ in maps):
                self.trace.follows[norm] = conv
