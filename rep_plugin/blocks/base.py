"""The contract of every re-parameterizable block: a named sum of linear chains that becomes one convolution."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rep_plugin.arguments import Channels, Padding, Size, checked
from rep_plugin.attached import own_forwards
from rep_plugin.blocks.branches import require_groups
from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.layers import require_eval
from rep_plugin.blocks.online import gain_of, init_gains_, merge_macs, run_macs, without_bns
from rep_plugin.errors import ArgumentError, NotMergeableError
from rep_plugin.functional.kernels import (
    ConvParams,
    fold_bn,
    merge_sum,
    pad_kernel,
    pair,
    regroup_kernel,
    without_autocast,
)


@checked
class RepBlock(nn.Module):
    """Sum of linear chains in training, one ``nn.Conv2d`` once deployed; an optional activation comes after either.

    (N, in_channels, H, W) -> (N, out_channels, H', W'), the sizes being those of
    ``nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: sides of the window, that of the deployed convolution.
        branches: chains by name (checkpoint keys: ``branches.<name>.<layer>``), each centred in the window.
        stride: stride in pixels.
        padding: rows and columns of zeros (default: "same").
        dilation: distance in pixels between two taps of the window.
        groups: groups of the convolution.
        act: module after the sum.
        deploy: build the merged form directly; no branch is used.
        post_bn: add a BN after the sum, as QARepVGG does (default: with ``online``).
        online: train the branches without their BNs, with a learned factor a channel in the place of each. The branches
            are merged in *every* step, so that a training step runs one convolution however many branches there are.

    Raises:
        ArgumentError: channels that ``groups`` does not divide, no branch, or a branch wider than the window.

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import Chain, RepBlock
        >>> chains = {"wide": Chain({"conv": torch.nn.Conv2d(4, 8, 3)}), "point": Chain({"conv": torch.nn.Conv2d(4, 8, 1)})}
        >>> block, x = RepBlock(4, 8, 3, chains).eval(), torch.ones(1, 4, 9, 9)
        >>> y = block(x)
        >>> block.switch_to_deploy()
        >>> block.reparam_conv, torch.allclose(block(x), y, atol=1e-5)
        (Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), True)
    """

    transposed = False
    output_padding = (0, 0)
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: Size,
        branches: Mapping[str, Chain],
        stride: Size = 1,
        padding: Padding | None = None,
        dilation: Size = 1,
        groups: Channels = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        post_bn: bool | None = None,
        online: bool = False,
    ):
        super().__init__()
        self.online = online
        require_groups(groups, in_channels=in_channels, out_channels=out_channels)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)
        same = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation))
        self.padding = same if padding is None else pair(padding)
        if deploy:
            self.reparam_conv = self._new_conv(in_channels, out_channels, groups)
        else:
            if not branches:
                raise ArgumentError(f"a block ({in_channels} -> {out_channels}) needs at least one branch, got none")
            self.branches = nn.ModuleDict({n: without_bns(chain) if online else chain for n, chain in branches.items()})
            for name, chain in self.branches.items():
                self._require_channels(name, chain)
                self._padding_of(name, chain)
            if online if post_bn is None else post_bn:
                self.post_bn = nn.BatchNorm2d(out_channels)
            self.init_gains_()
        self.act = act if act is not None else nn.Identity()

    @property
    def deployed(self) -> bool:
        """Return True once the block is one convolution."""
        return hasattr(self, "reparam_conv")

    def init_gains_(self) -> None:
        """Start every branch of the online form at unit gain, as its BN would; for use after the kernels were drawn."""
        if self.online and not self.deployed:
            for chain in self.branches.values():
                init_gains_(chain, self.in_channels)

    def _new_conv(self, in_channels: int, out_channels: int, groups: int) -> nn.Conv2d:
        return nn.Conv2d(
            in_channels, out_channels, self.kernel_size, self.stride, self.padding, self.dilation, groups, bias=True
        )

    def _require_channels(self, name: str, chain: Chain) -> None:
        convs = [op for op in chain.children() if isinstance(op, nn.Conv2d)]
        if convs and (convs[0].in_channels, convs[-1].out_channels) != (self.in_channels, self.out_channels):
            raise ArgumentError(
                f"branch {name!r} ({convs[0].in_channels} -> {convs[-1].out_channels}) must be "
                f"in_channels -> out_channels ({self.in_channels} -> {self.out_channels})"
            )

    def _padding_of(self, name: str, chain: Chain) -> tuple[int, int]:
        """Pixels of zeros that centre a chain in the block's window; negative: the map is cropped."""
        pixels = []
        for big, small, dilation, padding in zip(self.kernel_size, chain.kernel_size, self.dilation, self.padding):
            if small > big or (big - small) % 2:
                raise ArgumentError(
                    f"branch {name!r} of size {chain.kernel_size} cannot be centred in the block's {self.kernel_size}"
                )
            pixels.append(padding - dilation * (big - small) // 2)
        return pixels[0], pixels[1]

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):  # TorchScript compiles the deployed form alone
            return self.act(self.reparam_conv(x))
        else:
            return self._train_forward(x)

    def __prepare_scriptable__(self) -> "RepBlock":
        """Called by ``torch.jit.script``. Raises NotMergeableError for a training form."""
        if not self.deployed:
            raise NotMergeableError(
                "TorchScript takes deployed models only: call rep_plugin.reparameterize first, got "
                f"{type(self).__name__}({self.in_channels}, {self.out_channels})"
            )
        return self

    def _train_forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):  # to any torch.fx tracer the branches are one node
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        total = self._run_merged(x) if self.online and self._merging_pays(x) else self._run_branches(x)
        if hasattr(self, "post_bn"):
            total = self.post_bn(total)
        return self.act(total)

    def _merging_pays(self, x: Tensor) -> bool:
        """Whether one convolution and the merge cost less than the branches: not on small maps with wide branches."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return True
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        pixels_out = pixels // (self.stride[0] * self.stride[1])
        chains = list(self.branches.values())
        taps = self.kernel_size[0] * self.kernel_size[1]
        merged = pixels_out * taps * self.out_channels * self.in_channels // self.groups + sum(map(merge_macs, chains))
        return merged <= sum(run_macs(chain, pixels, pixels_out) for chain in chains)

    def _run_merged(self, x: Tensor) -> Tensor:
        """One convolution with what the branches add up to now; in half precision they are added up in float32."""
        dtype = self._dtype()
        merged = self._sum_branches(torch.promote_types(dtype, torch.float32))
        kernel, bias = (None if t is None else t.to(dtype) for t in (merged.kernel, merged.bias))
        return F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation, merged.groups)

    def _run_branches(self, x: Tensor) -> Tensor:
        """Every branch on the map, added up."""
        total, constant, like = None, None, None
        for name, chain in self.branches.items():
            y, scale, shift = chain.run(x, self._padding_of(name, chain))
            like = y if like is None else like
            if scale is None:
                total = y if total is None else total + y
            else:
                scale = scale.view(1, -1, 1, 1)
                total = y * scale if total is None else torch.addcmul(total, y, scale)
            if shift is not None:
                constant = shift if constant is None else constant + shift
        if constant is not None:
            total = total + constant.view(1, -1, 1, 1)
        return total.type_as(like)  # under autocast the float32 scales have promoted the sum

    def branch_outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Return what each branch adds to the sum, by name; nothing where the block is deployed.

        Args:
            x: the block's input (N, C, H, W).
        """
        if self.deployed:
            return {}
        return {name: chain(x, self._padding_of(name, chain)) for name, chain in self.branches.items()}

    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """Return the deployed convolution, computed in float64 and cast to the parameters' dtype; nothing is changed.

        Returns:
            ``(kernel (O, I / groups, kh, kw), bias (O,))``.

        Raises:
            TrainModeError: a BN in train mode.
        """
        if self.deployed:
            conv: Any = self.reparam_conv
            return conv.weight, conv.bias
        merged = self._merge()
        assert merged.bias is not None  # _merge gives one
        return merged.kernel, merged.bias

    def _dtype(self) -> torch.dtype:
        return next(t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    def _sum_branches(self, dtype: torch.dtype) -> ConvParams:
        """The branches as one convolution in ``dtype``, before ``post_bn``; differentiable."""
        merged = {name: chain.merge(self.in_channels, dtype) for name, chain in self.branches.items()}
        # The weights decide, not the attributes: surgery may have changed the widths since construction.
        in_channels = next(m.in_channels for m in merged.values())
        groups = in_channels if self.groups == self.in_channels and self.groups > 1 else self.groups
        pairs = []
        for name, m in merged.items():
            if m.kernel.shape[2:] != (1, 1) and any(
                k > 1 and d != want for k, d, want in zip(m.kernel.shape[2:], m.dilation, self.dilation)
            ):
                raise ArgumentError(f"branch {name!r} has dilation {m.dilation}, the block {self.dilation}")
            if m.stride != self.stride:
                raise ArgumentError(f"branch {name!r} has stride {m.stride}, the block {self.stride}")
            pairs.append((regroup_kernel(m.kernel, m.groups, groups), m.bias))
        with without_autocast(pairs[0][0].device):
            kernel, bias = merge_sum(pairs)
        return ConvParams(pad_kernel(kernel, self.kernel_size), bias, groups, self.stride, self.dilation)

    def _merge(self) -> ConvParams:
        """The deployed convolution: computed in float64, cast once to the parameters' dtype."""
        merged = self._sum_branches(torch.float64)
        kernel, bias = merged.kernel, merged.bias
        if hasattr(self, "post_bn"):
            require_eval(self.post_bn, "post_bn")
            kernel, bias = fold_bn(kernel, self.post_bn, bias)
        bias = kernel.new_zeros(len(kernel)) if bias is None else bias
        return merged._replace(kernel=kernel.to(self._dtype()), bias=bias.to(self._dtype()))

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Replace the branches by the one trainable convolution they add up to; a second call changes nothing.

        Raises:
            TrainModeError: a BN in train mode; the block is left as it was.
            NotMergeableError: a layer has a hook or a method of its own; likewise.
        """
        if self.deployed:
            return
        for name, what in own_forwards(self).items():
            if name.startswith(("branches", "post_bn")):
                raise NotMergeableError(f"{name!r} {what}, which a merge would lose: take it off first")
        merged = self._merge()
        with torch.device("meta"):  # no random numbers are drawn for weights that are set below
            conv = self._new_conv(merged.in_channels, merged.out_channels, merged.groups)
        conv = conv.to(merged.kernel.dtype).to_empty(device=merged.kernel.device)
        kernels = [p for p in self.parameters() if p.dim() == 4 and not p.is_contiguous()]  # 1x1s are both
        if any(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels):
            conv = conv.to(memory_format=torch.channels_last)
        conv.requires_grad_(any(p.requires_grad for p in self.parameters()))  # a frozen block stays frozen
        conv.weight.copy_(merged.kernel)
        conv.bias.copy_(merged.bias)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.reparam_conv = conv.train(self.training)
        del self.branches
        if hasattr(self, "post_bn"):
            del self.post_bn

    def output_bns(self) -> list[nn.Module]:
        """Return the BNs that end the branches: their gammas are a channel's weight in the block's output."""
        if self.deployed:
            return []
        if hasattr(self, "post_bn"):
            return [self.post_bn]
        return [bn for chain in self.branches.values() if (bn := chain.last_bn()) is not None]

    def output_gains(self) -> list[nn.Parameter]:
        """Return the factors that end the branches of the online form, where no BN of the block's own follows."""
        if self.deployed:
            return []
        last = (list(chain.children())[-1] for chain in self.branches.values())
        return [gain for op in last if (gain := gain_of(op)) is not None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, deployed={self.deployed}"
        )
