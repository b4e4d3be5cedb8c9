"""Terms that pull weak channels to zero while a model trains, added where the optimizer steps.

Sources: Liu et al., "Network Slimming" (ICCV 2017): L1 on the gammas of batch norms; Parikh and Boyd, "Proximal
Algorithms" (2014): soft thresholding; Wen et al., "Structured Sparsity" (NeurIPS 2016): group lasso on filters.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import NotNegative, OneOf, checked
from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.tracing.groups import frozen_roots
from rep_plugin.pruning.tracing.tracer import trace_channels

MODES = ("subgradient", "proximal")


def prunable_parts(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """Return the names of the batch norms and of the convolutions with channels that could be removed.

    Of a block only the output norms count: gammas inside are no signal.

    Args:
        model: Left as it is.
        shape: Of an input, (N, C, ...).

    Returns:
        (batch norms, convolutions).

    Raises:
        TraceError: The model cannot be traced.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods.sparsity import prunable_parts
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1))
        >>> prunable_parts(net, (1, 3, 8, 8))
        (['1'], ['0'])
    """
    trace = trace_channels(model, shape)
    roots, frozen = trace.channels.roots(), frozen_roots(trace)

    def can_go(labels: Tensor) -> bool:
        return not bool(frozen[roots[labels]].all())

    norms = [name for name, labels in trace.norms.items() if can_go(labels)]
    kernels = [name for name, layer in trace.layers.items() if layer.kind == "conv" and can_go(layer.labels)]
    return [name for name in norms if _has_gamma(model.get_submodule(name))], kernels


def all_parts(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of all batch norms and convolutions, of blocks the output norms only; nothing is traced."""
    modules = dict(model.named_modules())
    inside = {id(part) for block in modules.values() if isinstance(block, RepBlock) for part in block.modules()}
    ends = {id(bn) for block in modules.values() if isinstance(block, RepBlock) for bn in block.output_bns()}
    norms = [name for name, m in modules.items() if _has_gamma(m) and (id(m) in ends or id(m) not in inside)]
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return norms, [name for name, m in modules.items() if isinstance(m, kinds) and id(m) not in inside]


def _has_gamma(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.weight is not None


def strengths_of(names: Iterable[str], strength: float, overrides: Mapping[str, float]) -> dict[str, float]:
    """Return the strength of each name: that of the first pattern that fits, or else the common one.

    Args:
        names: Of batch norms.
        strength: The common one.
        overrides: {pattern: strength}.

    Returns:
        {name: strength}.

    Raises:
        ArgumentError: A pattern fits no name.
    """
    names = list(names)
    for pattern in overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(
                f"no prunable batch norm is named like {pattern!r}, expected one of {', '.join(names[:5])} ..."
            )
    return {n: next((value for p, value in overrides.items() if fnmatchcase(n, p)), strength) for n in names}


def trained_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict]]:
    """Yield every parameter with a gradient, and its group, which loading an optimizer's state replaces."""
    for group in optimizer.param_groups:
        yield from ((p, group) for p in group["params"] if p.grad is not None)


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step did nothing: mixed precision told a fused optimizer of gradients that are not finite."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


@checked
class Sparsity:
    """L1 on vectors (gammas) and group lasso on the rows of kernels, at every real step of an optimizer.

    ``subgradient``: ``grad += strength * sign(gamma)``, for kernels ``strength * filter / |filter|``, before the step: after
    the gradients are accumulated, averaged over processes, unscaled (also where a fused optimizer unscales them itself) and
    clipped. The term is thus never clipped, and is there once a step. ``proximal``: after the step every value is moved
    towards zero by ``lr * strength`` and stops there; filters shrink by as much in norm. Steps that mixed precision
    leaves out leave the terms out. Parameters without a gradient are not touched. Parameters keep their strength when
    channels are removed in place.

    Args:
        gammas: {parameter: strength} of L1.
        kernels: {parameter: strength} of group lasso.
        mode: ``subgradient`` or ``proximal``.

    Attributes:
        factor: Scales all strengths, for schedules.

    Raises:
        ArgumentError: The mode is unknown.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import Sparsity
        >>> gamma = torch.nn.Parameter(torch.tensor([1.0, 0.05]))
        >>> optimizer = torch.optim.SGD([gamma], 0.1)
        >>> Sparsity({gamma: 1.0}, mode="proximal").attach([optimizer])
        >>> gamma.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> [round(value, 2) for value in gamma.tolist()]
        [0.9, 0.0]
    """

    def __init__(
        self,
        gammas: Mapping[nn.Parameter, NotNegative],
        kernels: Mapping[nn.Parameter, NotNegative] | None = None,
        mode: Annotated[str, OneOf(MODES)] = "subgradient",
    ):
        self.gammas, self.kernels, self.mode, self.factor = dict(gammas), dict(kernels or {}), mode, 1.0
        self._handles: list = []

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Act on the steps of these optimizers.

        Raises:
            ArgumentError: None of them has any of the parameters.
        """
        optimizers = list(optimizers)
        held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        if not any(id(p) in held for p in (*self.gammas, *self.kernels)):
            raise ArgumentError(f"none of {len(self.gammas) + len(self.kernels)} sparse parameters is in an optimizer")
        for one in optimizers:
            if self.mode == "subgradient":
                self._handles.append(one.register_step_pre_hook(lambda optimizer, *_: self._add_gradients(optimizer)))
            else:
                self._handles.append(one.register_step_post_hook(lambda optimizer, *_: self._shrink(optimizer)))

    def detach(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _each(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, float, bool, dict]]:
        for parameter, group in trained_parameters(optimizer):
            for strengths, rows in ((self.gammas, False), (self.kernels, True)):
                if strength := strengths.get(parameter, 0.0) * self.factor:
                    yield parameter, strength, rows, group

    @torch.no_grad()
    def _add_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler where the optimizer unscales on its own
        for parameter, strength, rows, _ in self._each(optimizer):
            term = directions(parameter) if rows else parameter.sign()
            parameter.grad.add_(term if scale is None else term * scale.to(term.device), alpha=strength)

    @torch.no_grad()
    def _shrink(self, optimizer: torch.optim.Optimizer) -> None:
        if was_skipped(optimizer):
            return
        for parameter, strength, rows, group in self._each(optimizer):
            threshold = strength * float(group["lr"])
            if rows:
                parameter.mul_((1 - threshold / _norms(parameter)).clamp_min_(0))
            else:
                parameter.copy_(nn.functional.softshrink(parameter, threshold))


def _norms(kernel: Tensor) -> Tensor:
    """Norm of every filter, (O, 1, ...), never zero."""
    dims = tuple(range(1, kernel.dim()))
    return torch.linalg.vector_norm(kernel, dim=dims, keepdim=True).clamp_min(torch.finfo(kernel.dtype).tiny)


def directions(kernel: Tensor) -> Tensor:
    """Return every filter divided by its norm: the gradient of group lasso."""
    return kernel / _norms(kernel)
