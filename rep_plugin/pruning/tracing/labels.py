"""Numbers for channels, and which of them stand or fall together.

While a model is traced, every map carries a tensor of labels of its own shape: each element the number of the channel it
belongs to. Whatever moves elements (view, cat, chunk, permute, flatten ...) moves the labels likewise, so that the layout
rules are torch's own. Label 0 belongs to no channel that could go.
"""

import numpy as np
import torch
from torch import Tensor

FIXED = 0


def connected(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the smallest number of its component for each of 0..count-1.

    Args:
        count: How many numbers there are.
        edges: Pairs of tensors (E,): each element of the first is connected to that of the second.

    Returns:
        (count,) int64.
    """
    if not edges:
        return torch.arange(count)
    from scipy.sparse import coo_matrix  # 0.2 s that `import rep_plugin` need not take
    from scipy.sparse.csgraph import connected_components

    ends = [torch.cat(side).numpy() for side in zip(*edges)]
    graph = coo_matrix((np.ones(len(ends[0]), dtype=bool), ends), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, smallest = np.unique(component, return_index=True)
    return torch.from_numpy(smallest[component])


class Channels:
    """All labels of a model: draws new ones, ties and freezes them, and finds which belong together.

    A *product* label is an output of bilinear pooling: it stays where both channels it was made of stay.
    """

    def __init__(self):
        self.count = 1
        self.frozen: list[tuple[Tensor, str]] = []
        self.mixed: list[tuple[Tensor, str]] = []
        self.balanced: list[Tensor] = []
        self.products: list[tuple[int, Tensor, Tensor]] = []
        self._edges: list[tuple[Tensor, Tensor]] = []
        self._roots: Tensor | None = None

    def fresh(self, number: int) -> Tensor:
        """Return ``number`` new labels, (number,)."""
        labels = torch.arange(self.count, self.count + number)
        self.count += number
        self._roots = None
        return labels

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """Return new labels that stay where two channels both stay.

        Args:
            first: Labels (D,).
            second: Labels (D,).
        """
        labels = self.fresh(len(first))
        self.products.append((int(labels[0]), first, second))
        return labels

    def is_product(self, labels: Tensor) -> Tensor:
        """Return where labels are those of products."""
        mask = torch.zeros_like(labels, dtype=torch.bool)
        for start, first, _ in self.products:
            mask |= (labels >= start) & (labels < start + len(first))
        return mask

    def tie(self, first: Tensor, second: Tensor, what: str) -> None:
        """Let channels stand or fall together.

        Args:
            first: Labels of any shape.
            second: Labels of the same shape, each tied to that of ``first`` in its place.
            what: The operation that ties them, for the reason where products of channels cannot follow.
        """
        first, second = squeeze_constant(first, second)
        first, second = first.flatten(), second.flatten()
        differ = first != second
        if not differ.any():
            return
        first, second = first[differ], second[differ]
        if self.products and (self.is_product(first).any() or self.is_product(second).any()):
            reason = f"feeds a bilinear pooling whose products meet in {what}: do that before the pooling"
            self.freeze(first, reason)
            self.freeze(second, reason)
        self._edges.append((first, second))
        self._roots = None

    def tie_along(self, labels: Tensor, dim: int, what: str) -> None:
        """Tie all labels along a dimension.

        Args:
            labels: Of a map.
            dim: The dimension.
            what: The operation, for the reason where a whole layer becomes one unit.
        """
        if self.varies(labels, dim):
            self.mixed.append((labels.unique(), what))
            self.tie(labels, labels.narrow(dim, 0, 1).expand_as(labels), what)

    def balance(self, rows: Tensor) -> None:
        """Let every row of labels (groups, width) keep as many channels as the others."""
        if len(rows) > 1:
            self.balanced.append(rows)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Let channels stay for good; the owners of products as well.

        Args:
            labels: Of any shape.
            reason: Why, as what is said of the layer that makes them: ``makes the model output``.
        """
        labels = squeeze_constant(labels)[0].unique()
        labels = labels[labels != FIXED]
        if not len(labels):
            return
        for start, first, second in self.products:
            inside = labels[(labels >= start) & (labels < start + len(first))] - start
            if len(inside):
                self.frozen.append((torch.cat([first[inside], second[inside]]).unique(), reason))
        self.frozen.append((labels, reason))

    def roots(self) -> Tensor:
        """Return the number of its tied set for every label, (count,)."""
        if self._roots is None:
            self._roots = connected(self.count, self._edges)
            first, second = self._roots, torch.arange(self.count)
            moved = first != second
            self._edges = [(first[moved], second[moved])]
        return self._roots

    def varies(self, labels: Tensor, dim: int) -> bool:
        """Return whether channels of different tied sets lie along a dimension.

        Args:
            labels: Of a map.
            dim: The dimension.
        """
        if labels.shape[dim] < 2 or labels.stride(dim) == 0:
            return False
        labels = squeeze_constant(labels)[0]
        if bool((labels == labels.narrow(dim, 0, 1)).all()):
            return False
        roots = self.roots()[labels]
        return not bool((roots == roots.narrow(dim, 0, 1)).all())

    def varying(self, labels: Tensor) -> list[int]:
        """Dimensions along which channels of different tied sets lie."""
        return [dim for dim in range(labels.dim()) if self.varies(labels, dim)]

    def along(self, labels: Tensor, dim: int) -> Tensor | None:
        """Return the labels along one dimension, or None where another one varies too.

        Args:
            labels: Of a map.
            dim: The dimension.
        """
        others = [other for other in range(labels.dim()) if other != dim % labels.dim()]
        if any(self.varies(labels, other) for other in others):
            return None
        for other in others:
            labels = labels.narrow(other, 0, 1)
        return labels.flatten()


def squeeze_constant(*labels: Tensor) -> list[Tensor]:
    """Cut the dimensions along which none of the tensors (of equal shape) changes to length 1: a view."""
    out = list(labels)
    for dim in range(out[0].dim()):
        if out[0].shape[dim] > 1 and all(t.stride(dim) == 0 for t in out):
            out = [t.narrow(dim, 0, 1) for t in out]
    return out


def compress(labels: Tensor) -> Tensor:
    """Return the same labels without memory for the dimensions along which they do not change."""
    shape = labels.shape
    labels = squeeze_constant(labels)[0]
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1)
        if labels.shape[dim] > 1 and bool((labels == first).all()):
            labels = first
    return labels.expand(shape)
