"""Parameters and multiply-adds of a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from rep_plugin.arguments import checked
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.forward import first_image, of_user, run_model
from rep_plugin.measure.randomness import private_random


@checked
def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once.

    Example:
        >>> count_params(nn.Linear(3, 4))
        16
    """
    return sum(p.numel() for p in model.parameters())


class MacCounter(TorchDispatchMode):
    """Adds up the multiply-adds of the operators that torch has a formula for.

    FlopCounterMode counts the same, by module, and takes up to 1.4 times as long.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out


class _SkipNorm(TorchFunctionMode):
    """BatchNorm keeps the shape: nothing to compute where only shapes are asked for (torch's own way takes 0.4 ms)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.batch_norm:
            return torch.empty_like(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


def _shapes_of(model: nn.Module) -> nn.Module:
    """Return a copy of the model that holds no data: its parameters and buffers are on the meta device."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy_model(model, memo, training=False)


@checked
@torch.no_grad()
@private_random()
def count_macs(model: nn.Module, example_input: torch.Tensor | Sequence | Mapping) -> int:
    """Return the multiply-adds of all convolutions and matrix products of the forward pass of one image.

    Elementwise work, normalisation and pooling are not counted. Only shapes are computed, on a copy, unless the forward needs
    values; the model is left as it is.

    Args:
        model: the model.
        example_input: images (N, C, H, W), or a tuple or a dict of what the model is called with. The batch is the first
            dimension of the first tensor; only its first image is counted, where the model takes one alone.

    Returns:
        The number for one image, whatever N is.

    Example:
        >>> count_macs(nn.Conv2d(3, 4, 1), torch.zeros(8, 3, 5, 5))
        300
    """
    one, images = first_image(example_input)
    try:
        return _count(model, one)
    except Exception:  # that a model takes batches of some sizes only is said in as many ways as there are models
        with of_user(model, example_input):
            return _count(model, example_input) // images


def _count(model: nn.Module, example: object) -> int:
    shapes = _shapes_of(model)
    try:
        with _SkipNorm(), MacCounter() as counter:
            run_model(
                shapes, tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, example)
            )
        return counter.total
    except Exception:  # a forward that reads values may raise anything; what else is wrong is raised again below
        copied = copy_model(model, training=False)
        with MacCounter() as counter:
            run_model(copied, copy_inputs(example))
        return counter.total
