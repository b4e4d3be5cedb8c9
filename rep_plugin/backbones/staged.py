"""What the backbones share: checked arguments, first weights, strict loading and the walk over the stages."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from torch import Tensor, nn

from rep_plugin.arguments import In, shown
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.branches import he_normal_
from rep_plugin.checkpoints.strict import load_whole
from rep_plugin.errors import ArgumentError, did_you_mean

Strides = Sequence[Annotated[int, In("[1, 2]")]]
Depths = Sequence[Annotated[int, In("[1, 256]")]]
Widths = Sequence[Annotated[float, In("(0, 64]")]]


def check_maps(out_indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Check which maps a network gives.

    Args:
        out_indices: the wanted maps.
        count: number of maps.

    Returns:
        ``out_indices`` as a tuple.

    Raises:
        ArgumentError: an index over ``count - 1``.
    """
    if bad := [index for index in out_indices if index not in range(count)]:
        raise ArgumentError(f"out_indices must lie in 0..{count - 1}, got {bad[0]}")
    return tuple(out_indices)


def check_strides(strides: Sequence[int], stages: int) -> tuple[int, ...]:
    """Check the strides of a network.

    Args:
        strides: 1 or 2, of the stem and the stages.
        stages: number of stages.

    Returns:
        ``strides`` as a tuple.

    Raises:
        ArgumentError: another number of them, or not 1 or 2.
    """
    if len(strides) != stages + 1:
        raise ArgumentError(f"strides must be {stages + 1} numbers of 1 or 2 (stem, stages), got {tuple(strides)}")
    return tuple(strides)


class Step(NamedTuple):
    """How a stage begins.

    Args:
        stride: stride of its first block.
        first_dilation: dilation of its first block.
        dilation: dilation of its other blocks.
        unstrided: its first block has lost its stride to dilation.
    """

    stride: int
    first_dilation: int
    dilation: int
    unstrided: bool

    def of_block(self, index: int) -> tuple[int, int, bool]:
        """Return stride, dilation and ``unstrided`` of a block of the stage."""
        return (self.stride, self.first_dilation, self.unstrided) if index == 0 else (1, self.dilation, False)


def plan_steps(strides: Sequence[int], output_stride: int | None) -> list[Step]:
    """Return the steps of the stages of a network that goes down by a limited stride.

    From the limit on dilation stands in for strides: parameters stay the same, and every 2nd (4th ...) pixel of a map is
    exactly the pixel of the strided network (Chen et al., "Rethinking Atrous Convolution", 2017, section 3.1).

    Args:
        strides: of the stem and the stages.
        output_stride: the limit; None: none.

    Returns:
        One step for each stage.

    Raises:
        ArgumentError: anything but a power of 2 from the stem's stride on.
    """
    powers = [strides[0] * 2**i for i in range(len(strides))]
    if output_stride is not None and output_stride not in powers:
        raise ArgumentError(f"output_stride must be one of {', '.join(map(str, powers))}, got {output_stride!r}")
    reduction, dilation, steps = strides[0], 1, []
    for stride in strides[1:]:
        unstrided = output_stride is not None and reduction * stride > output_stride
        before = dilation
        if unstrided:
            dilation *= stride
        else:
            reduction *= stride
        steps.append(Step(1 if unstrided else stride, before, dilation, unstrided))
    return steps


def pick_arch(arch: str | Mapping, table: Mapping[str, Any], network: str) -> Any:
    """Return the entry of an arch table, or a new one of the same kind.

    Args:
        arch: a name in the table, or a dict of an entry's fields.
        table: the table.
        network: the network's name, for messages.

    Returns:
        Entry of the table's class.

    Raises:
        ArgumentError: an unknown name or field.
    """
    if isinstance(arch, str) and arch in table:
        return table[arch]
    if not isinstance(arch, Mapping):
        hint = did_you_mean(arch, table) if isinstance(arch, str) else ""
        raise ArgumentError(
            f"unknown arch {shown(arch)} of {network}, expected one of {', '.join(table)} or a dict{hint}"
        )
    try:
        return type(next(iter(table.values())))(**arch)
    except ArgumentError as error:
        raise ArgumentError(f"arch {shown(dict(arch))} of {network}: {error}") from None


def check_stages(**fields: Sequence) -> None:
    """Raise ArgumentError unless all are sequences of one length, with one value a stage."""
    lengths = {name: len(value) for name, value in fields.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise ArgumentError(f"an arch needs one value a stage in each of its lists, got {lengths}")


class StagedNetwork(nn.Module):
    """A ``stem`` and a Sequential of ``stages``: (N, in_channels, H, W) -> the maps of ``out_indices``, as a tuple.

    A subclass also sets ``out_channels`` and ``reductions``, one for each index, the stem's ``stem_channels`` and
    ``stem_reduction``, and ``steps``, one for each stage.
    """

    def _lay_out(
        self,
        arch: str | Mapping,
        table: Mapping[str, Any],
        network: str,
        out_indices: Sequence[int],
        strides: Sequence[int],
        output_stride: int | None,
    ) -> Any:
        """Check the arguments and set widths and strides of a network whose stages are 64, 128, ... times ``widths`` wide.

        Return the arch's settings. Raises ArgumentError as the checks above do.
        """
        settings = pick_arch(arch, table, network)
        count = len(settings.depths)
        self.out_indices = check_maps(out_indices, count)
        self.arch, self.strides = arch, check_strides(strides, count)
        self.out_channels = [int(64 * 2**i * factor) for i, factor in enumerate(settings.widths)]
        self._step(strides, output_stride)
        self.stem_channels = min(64, self.out_channels[0])
        return settings

    def _step(self, strides: Sequence[int], output_stride: int | None) -> None:
        self.steps, self.stem_reduction = plan_steps(strides, output_stride), strides[0]
        self.reductions = [
            self.stem_reduction * math.prod(step.stride for step in self.steps[: i + 1]) for i in range(len(self.steps))
        ]

    def _init_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module)
        for module in self.modules():
            if isinstance(module, RepBlock):
                module.init_gains_()

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """As torch's, but a strict load that does not fit raises before anything is loaded."""
        return load_whole(self, super().load_state_dict, state_dict, strict, assign)

    def parts(self) -> Sequence[nn.Module]:
        """Return what ``out_indices`` count: the stages, and what a network has behind them."""
        return list(self.stages)

    def outgoing(self, index: int, x: Tensor) -> Tensor:
        """Return a stage's map as it leaves the network; the next stage reads the map itself.

        Args:
            index: the stage.
            x: its map (N, C, H, W).
        """
        return x

    def finish(self, x: Tensor) -> Tensor:
        """Return what a classifier pools, given the last stage's map."""
        return self.outgoing(len(self.stages) - 1, x)

    def drop_finish(self) -> None:
        """Remove what :meth:`finish` adds."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        outs = []
        for index, part in enumerate(self.parts()[: max(self.out_indices, default=0) + 1]):
            x = part(x)
            if index in self.out_indices:
                outs.append(self.outgoing(index, x))
        return tuple(outs)
