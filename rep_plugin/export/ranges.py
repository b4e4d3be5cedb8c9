"""Ranges of layers, of weights and outputs, in a model and in what it was before a merge."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.export.export_onnx import IMAGES_AT_ONCE
from rep_plugin.measure.copies import copy_model

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
Pair = tuple[float, float]


def weight_widths(weight: Tensor) -> Pair:
    """Return the largest weight of a layer, and how much larger its widest channel is than its narrowest."""
    each = weight.detach().flatten(1).abs().amax(1)
    return each.max().item(), (each.max() / each.clamp_min(1e-12).min()).item()


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


@torch.no_grad()
def output_ranges(model: nn.Module, images: Tensor) -> dict[str, Pair]:
    """Return the lowest and the highest output of each convolution, linear layer and branch of a block.

    Args:
        model: in eval mode; a copy is run.
        images: (N, C, H, W).

    Returns:
        Name -> range; what is not called is left out. Branches are named by their block and their own name.
    """
    copied, found = copy_model(model).cpu(), {}

    def keep(name: str, output: Tensor) -> None:
        low, high = (float(value) for value in torch.aminmax(output))
        old = found.get(name, (low, high))
        found[name] = min(low, old[0]), max(high, old[1])

    def keep_branches(name: str, block: RepBlock, x: Tensor) -> None:
        for branch, output in block.branch_outputs(x).items():
            keep(f"{name}.{branch}", output)

    for name, module in copied.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        elif isinstance(module, RepBlock):
            module.register_forward_pre_hook(lambda module, args, name=name: keep_branches(name, module, args[0]))
    for batch in images.split(IMAGES_AT_ONCE):
        copied(batch)
    return found


def _is_in(name: str, block: str) -> bool:
    return name == block or not block or name.startswith(f"{block}.")


class Before:
    """What layers of a merged model were before.

    Args:
        model: before the merge.
        blocks: names of the modules that were merged.
        images: (N, C, H, W).
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], images: Tensor):
        self._layers, self._ranges = _layers(model), output_ranges(model, images)
        self._blocks = sorted(blocks, key=len)

    def of(self, name: str) -> tuple[float | None, float | None, Pair | None]:
        """Return the largest weight, the largest spread, and the range of outputs of all layers that became one.

        Args:
            name: of the layer, merged.

        Returns:
            The three; None for what is not known.
        """
        block = next((one for one in self._blocks if _is_in(name, one)), name)
        inside = [one for one in self._layers if _is_in(one, block)]
        if not inside:
            return None, None, None
        widths = [weight_widths(self._layers[one].weight) for one in inside]
        ranges = [pair for one, pair in self._ranges.items() if _is_in(one, block)]
        whole = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
        return max(width for width, _ in widths), max(spread for _, spread in widths), whole
