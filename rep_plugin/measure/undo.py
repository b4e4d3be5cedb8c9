"""All or nothing: where changing a model in place fails, the model is as it was."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOLDERS = (dict, OrderedDict, list, set)


def _refill(holder: Any, content: Any) -> None:
    if isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        holder.update(content)


def _swap_data(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.dtype != data.dtype:
        tensor.grad = None
        # Autograd keeps a node with the old shape as long as somebody holds it; another dtype makes it drop it.
        tensor.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
        tensor.data = data
    tensor.grad = grad


@contextmanager
def undone_on_error(
    *models: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    tables: Iterable[dict] = (),
    values: bool = True,
) -> Iterator[None]:
    """Give models what they held where the body of the ``with`` fails, or is interrupted.

    Modules, parameters and dicts stay the same objects.

    Args:
        models: what is changed in place.
        optimizers: whose state is changed along.
        tables: dicts that are changed along, besides.
        values: the body writes into tensors; False: it gives them other memory, so that no values need to be kept.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> try:
        ...     with undone_on_error(model):
        ...         model[0] = nn.Identity()
        ...         raise ValueError
        ... except ValueError:
        ...     type(model[0]).__name__
        'Conv2d'
    """
    modules = dict.fromkeys(module for model in models for module in model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    inside = [value for _, own in attributes for value in own.values() if type(value) in _HOLDERS]
    states = [state for optimizer in optimizers for state in (optimizer.state, *optimizer.state.values())]
    holders = [(one, list(one) if isinstance(one, (list, set)) else dict(one)) for one in (*inside, *states, *tables)]
    tensors = dict.fromkeys(t for model in models for t in (*model.parameters(), *model.buffers()))
    kept = [(t, t.data, t.data.clone() if values else None, t.requires_grad, t.grad) for t in tensors]
    try:
        yield
    except BaseException:
        for module, own in attributes:
            _refill(vars(module), own)
        for holder, content in holders:
            _refill(holder, content)
        with torch.no_grad():
            for tensor, data, value, trained, grad in kept:
                if value is not None:
                    data.copy_(value)
                _swap_data(tensor, data, grad)
                tensor.requires_grad_(trained)
        raise
