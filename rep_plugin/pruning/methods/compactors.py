"""Compactors: 1x1 convolutions behind Conv-BN pairs that learn which channels a network can forget.

Source: Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting" (ICCV 2021).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import ConvParams, bn_scale_shift, compose, identity_kernel, sum_kernel_taps
from rep_plugin.pruning.tracing.graph import Trace, member
from rep_plugin.pruning.tracing.tracer import trace_channels

NAME = "compactor"  # of the child that a compactor becomes, so that every other key of the state dict stays


class Compactor(nn.Module):
    """A 1x1 convolution (C, C / groups, 1, 1) without bias that begins as the identity.

    No ``nn.Conv2d``: a network's own initialisation, which goes by type, must leave it alone.

    Args:
        channels: C.
        groups: Of the convolution.
        like: A tensor whose dtype and device it gets.
    """

    def __init__(self, channels: int, groups: int = 1, like: Tensor | None = None):
        super().__init__()
        options = {} if like is None else dict(dtype=like.dtype, device=like.device)
        self.weight = nn.Parameter(identity_kernel(channels, groups, **options))

    @property
    def groups(self) -> int:
        return len(self.weight) // self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[1] == 1:
            return x * self.weight.view(1, -1, 1, 1).to(x.dtype)
        return F.conv2d(x, self.weight, groups=self.groups)

    def row_norms(self) -> Tensor:
        """Return the norm of every row, (C,) float64 on the CPU."""
        return self.weight.detach().double().flatten(1).norm(dim=1).cpu()

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}"


@dataclass(frozen=True)
class Site:
    """Where a compactor stands.

    Attributes:
        conv: The convolution before.
        norm: The batch norm that alone reads it.
        place: The module whose output the compactor takes: the norm, or what timm's BatchNormAct2d calls between norm and
            activation.
        groups: Of the compactor.
        scored: Its rows are part of a channel's score; those of a depthwise convolution, whose groups are single channels,
            only follow.
    """

    conv: str
    norm: str
    place: str
    groups: int
    scored: bool


def _place(bn: nn.Module, name: str) -> str | None:
    """Return the module whose output is a batch norm's, None where that is not known or it is no affine map."""
    if not isinstance(bn, _BatchNorm) or bn.weight is None or bn.bias is None or bn.running_var is None:
        return None
    if type(bn).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return name
    timms = type(bn).__name__ in ("BatchNormAct2d", "SyncBatchNormAct")
    return member(name, "drop") if timms and isinstance(bn._modules.get("drop"), nn.Module) else None


def find_sites(model: nn.Module, trace: Trace) -> list[Site]:
    """Return where compactors can stand: behind each batch norm that alone reads a convolution.

    A compactor has the groups of its convolution, so that it merges into that; behind a depthwise one it is a factor for
    each channel.

    Args:
        model: Left as it is.
        trace: Of the model.

    Returns:
        The places, in order of execution.
    """
    sites = []
    for norm, conv in trace.conv_of_norm.items():
        layer, module = trace.layers[conv], model.get_submodule(conv)
        place = _place(model.get_submodule(norm), norm)
        if place is None or not isinstance(module, nn.Conv2d) or layer.weight != member(conv, "weight"):
            continue
        single = layer.groupwise
        sites.append(Site(conv, norm, place, len(layer.labels) if single else layer.groups, not single))
    return sites


def _compact(place: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return getattr(place, NAME)(output)  # a function of the module alone: copies of a model run their own compactors


def compactors_of(model: nn.Module, sites: Iterable[Site]) -> dict[str, Compactor]:
    """Return the compactors of a model.

    Args:
        model: With compactors.
        sites: Where they stand.

    Returns:
        {name of the convolution: compactor}.
    """
    return {site.conv: getattr(model.get_submodule(site.place), NAME) for site in sites}


def insert_compactors_(model: nn.Module, sites: Sequence[Site]) -> None:
    """Put an identity behind every site, as a child named ``compactor``: all other keys of the state dict stay.

    Args:
        model: Changed in place.
        sites: Where the compactors shall stand.

    Raises:
        ArgumentError: A site has something of that name.
    """
    for site in sites:
        place = model.get_submodule(site.place)
        if hasattr(place, NAME):
            raise ArgumentError(f"{site.place!r} has a {NAME!r} already, expected a model without")
    for site in sites:
        place, bn = model.get_submodule(site.place), model.get_submodule(site.norm)
        setattr(place, NAME, Compactor(len(bn.weight), site.groups, bn.weight.detach()).train(bn.training))
        place.register_forward_hook(_compact)


def require_running(model: nn.Module, sites: Sequence[Site], shape: tuple[int, ...]) -> None:
    """Require that a forward pass runs every compactor.

    Args:
        model: With compactors.
        sites: Where they stand.
        shape: Of an input, (N, C, H, W).

    Raises:
        ArgumentError: A compactor is not run: the model does not call its norm as a module.
    """
    slices = trace_channels(model, shape).slices
    for site in sites:
        if member(site.place, f"{NAME}.weight") not in slices:
            raise ArgumentError(f"a compactor behind {site.place!r} is not run: the model does not call it as a module")


@torch.no_grad()
def merge_compactors_(model: nn.Module, sites: Iterable[Site]) -> None:
    """Merge every compactor into the convolution before its batch norm; the keys are the stock network's again.

    In eval mode nothing changes: the convolution takes the norm's scale and the compactor in, and the norm takes their
    shift: ``beta' = Q beta``, ``mean' = Q (scale * mean)``, a bias of the convolution likewise. Its variance, which is free
    in eval mode (``gamma' = sqrt(var' + eps)``), is the sum of ``Q^2 gamma^2``: that of its input as far as channels are
    not correlated, so that fine-tuning begins near this function. Computed in float64.

    Args:
        model: With compactors, changed in place.
        sites: Where they stand.
    """
    for site in sites:
        conv, bn = model.get_submodule(site.conv), model.get_submodule(site.norm)
        place = model.get_submodule(site.place)
        compactor: Compactor = getattr(place, NAME)
        q, groups = compactor.weight.double(), compactor.groups
        scale, _ = bn_scale_shift(bn, torch.float64)

        def mix(vector: Tensor, kernel: Tensor = q, groups: int = groups) -> Tensor:
            return sum_kernel_taps(kernel, groups, vector.double())

        folded = ConvParams(conv.weight.double() * scale.view(-1, 1, 1, 1), None, conv.groups)
        kernel = compose(folded, ConvParams(q, None, groups)).kernel
        variance, beta, mean = mix(bn.weight.double().square(), q.square()), mix(bn.bias), mix(bn.running_mean * scale)
        if conv.bias is not None:
            conv.bias.copy_(mix(conv.bias * scale))
        conv.weight.copy_(kernel)
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(variance)
        bn.bias.copy_(beta)
        bn.weight.copy_(torch.sqrt(variance + bn.eps))
        delattr(place, NAME)
        for key in [key for key, hook in place._forward_hooks.items() if hook is _compact]:
            del place._forward_hooks[key]
