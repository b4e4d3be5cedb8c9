"""Rep-MobileNetV2 from a stock MobileNetV2: timm's, mmpretrain's and torchvision's state dicts, recognised by their keys.

A network built with ``anneal=True`` and given stock weights computes what stock does, borders included; annealing
(:mod:`rep_plugin.blocks.annealed`) leads from there to the mergeable form. Branches that stock lacks start at gamma 0.

Stock's skip becomes the ``identity`` branch: a BN with gamma = sqrt(var + eps) and beta = mean, which is the exact
identity in eval mode *whatever* mean and var are. In train mode it takes batch statistics, and is the identity as far as
mean and var are those of its input. No image is needed for them: after a BN a channel has mean beta and variance
gamma^2 * var / (var + eps), in every batch (up to eps), and a skip adds the means. So the second block of a stage starts
as stock in train mode too; the later ones neglect the covariance of skip and branch, which :func:`measure_identities_`
takes from data.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.annealed import ALPHA, annealed_modules
from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import ArgumentError, CheckpointMismatchError
from rep_plugin.functional.kernels import bn_scale_shift, pad_kernel

STEM_OF = {"timm": "conv_stem", "mmpretrain": "conv1.conv", "torchvision": "features.0.0"}
HEAD_OF = {"timm": "classifier", "mmpretrain": "head.fc", "torchvision": "classifier.1"}
WRAPPERS = ("", "module.", "backbone.", "module.backbone.")
HEADS = ("classifier.", "head.", "neck.", "data_preprocessor.")
BN_KEYS = ("weight", "bias", "running_mean", "running_var")
QUANTILES = 999  # of a normal distribution, for the moments of an activation's output


def stock_format(state_dict: Mapping) -> tuple[str, str] | None:
    """Return (format, prefix of its keys) of a stock MobileNetV2's state dict, or None where it is not one."""
    for name, stem in STEM_OF.items():
        for prefix in WRAPPERS:
            if f"{prefix}{stem}.weight" in state_dict:
                return name, prefix
    return None


def _stock_layers(name: str, stage: int, index: int, flat: int, roles: list[str]) -> Iterator[tuple[str, str]]:
    """Yield stock's names of (conv, bn) for each layer of a block; ``flat`` counts blocks over all stages."""
    for place, role in enumerate(roles):
        if name == "timm":
            root = f"blocks.{stage}.{index}"
            last = "conv_pwl" if "expand" in roles else "conv_pw"
            conv = {"expand": "conv_pw", "depthwise": "conv_dw", "project": last}[role]
            yield f"{root}.{conv}", f"{root}.bn{place + 1}"
        elif name == "mmpretrain":
            root = f"layer{stage + 1}.{index}.conv.{place}"
            yield f"{root}.conv", f"{root}.bn"
        else:
            root = f"features.{flat + 1}.conv"
            is_last = role == "project"
            yield (f"{root}.{place}", f"{root}.{place + 1}") if is_last else (f"{root}.{place}.0", f"{root}.{place}.1")


def _ends(name: str, blocks: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Stock's names of (conv, bn) of the stem and of the last convolution."""
    if name == "timm":
        return ("conv_stem", "bn1"), ("conv_head", "bn2")
    if name == "mmpretrain":
        return ("conv1.conv", "conv1.bn"), ("conv2.conv", "conv2.bn")
    return ("features.0.0", "features.0.1"), (f"features.{blocks + 1}.0", f"features.{blocks + 1}.1")


class _Reader:
    """Takes tensors out of a stock state dict, checks their shapes, and remembers which were taken."""

    def __init__(self, state_dict: Mapping, name: str, prefix: str, own: Mapping):
        self.state_dict, self.name, self.prefix, self.own = state_dict, name, prefix, own
        self.taken: set[str] = set()
        self.result = {key: value.detach().clone() for key, value in own.items()}

    def copy(self, target: str, source: str, optional: bool = False) -> None:
        source = f"{self.prefix}{source}"
        if source not in self.state_dict:
            if optional:
                return
            raise CheckpointMismatchError(
                f"the {self.name} checkpoint lacks {source!r}, expected a MobileNetV2 of the same depth; nothing was loaded"
            )
        value, expected = self.state_dict[source], self.own[target]
        if value.dim() == 4 and value.shape[:2] == expected.shape[:2] and value.shape[2:] == (1, 1):
            value = pad_kernel(value, tuple(expected.shape[2:]))  # last_kernel=3
        if value.shape != expected.shape:
            raise CheckpointMismatchError(
                f"{source!r} of the {self.name} checkpoint has shape {tuple(value.shape)}, the model's {target!r} "
                f"{tuple(expected.shape)}: widen_factor, in_channels or num_classes differ; nothing was loaded"
            )
        self.result[target] = value.detach().to(expected.device, expected.dtype, copy=True)
        self.taken.add(source)

    def conv_bn(self, conv: str, bn: str, names: tuple[str, str]) -> None:
        self.copy(f"{conv}.weight", f"{names[0]}.weight")
        for key in BN_KEYS:
            self.copy(f"{bn}.{key}", f"{names[1]}.{key}")
        self.copy(f"{bn}.num_batches_tracked", f"{names[1]}.num_batches_tracked", optional=True)

    def moments(self, bn: str, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of a BN's output over the data it was trained on, in float64."""
        gamma, beta, var = (self.result[f"{bn}.{key}"].double() for key in ("weight", "bias", "running_var"))
        return beta, gamma**2 * var / (var + eps)

    def require_all_taken(self) -> None:
        left = [key for key in self.state_dict if key.startswith(self.prefix) and key not in self.taken]
        left = [key for key in left if not key.removeprefix("module.").startswith(HEADS)]
        if left:
            raise CheckpointMismatchError(
                f"the {self.name} checkpoint has {len(left)} tensors that MobileNetV2 has no place for (first: "
                f"{', '.join(left[:3])}); nothing was loaded"
            )


def _require_able(model: nn.Module, name: str) -> None:
    blocks = {f"stages.{s}.{i}": block for s, stage in enumerate(model.stages) for i, block in enumerate(stage)}
    if not any(annealed_modules(model)):
        raise CheckpointMismatchError(
            f"this is a stock MobileNetV2 checkpoint ({name} keys): only {type(model).__name__}(anneal=True, deploy=False) "
            "starts from one; nothing was loaded"
        )
    for key, block in blocks.items():
        needed = ["bottleneck"] + ["identity"] * (block.stride == (1, 1) and block.in_channels == block.out_channels)
        lacking = [branch for branch in needed if branch not in block.branches]
        if lacking:
            raise CheckpointMismatchError(
                f"block {key!r} has the branches {tuple(block.branches)}, expected {lacking[0]!r} too: stock's block has it; "
                "nothing was loaded"
            )


def _after_act(mean: Tensor, var: Tensor, act: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``act`` of normal values."""
    steps = (torch.arange(QUANTILES, dtype=mean.dtype, device=mean.device) + 0.5) / QUANTILES
    values = act(mean + var.sqrt() * torch.special.ndtri(steps).view(-1, 1))
    return values.mean(0), values.var(0, unbiased=False)


@torch.no_grad()
def from_stock(model: nn.Module, state_dict: Mapping) -> dict[str, Tensor]:
    """Return a stock MobileNetV2's state dict as one of an annealed RepMobileNetV2, alphas 0; nothing is changed.

    A classifier is taken over where both have one. Stock's BNs must have the model's ``eps`` (1e-5), which is in no state
    dict.

    Args:
        model: the annealed RepMobileNetV2.
        state_dict: stock's.

    Returns:
        State dict with the model's keys.

    Raises:
        CheckpointMismatchError: keys of no known format, missing or left-over keys, other shapes, or a model without the
            branches that stock needs.
    """
    layout = stock_format(state_dict)
    if layout is None:
        raise CheckpointMismatchError(
            f"this is no stock MobileNetV2 checkpoint: expected one of {[f'{stem}.weight' for stem in STEM_OF.values()]}, "
            f"got {next(iter(state_dict), 'no key')!r} first"
        )
    name, prefix = layout
    _require_able(model, name)
    own = model.state_dict()
    reader = _Reader(state_dict, name, prefix, own)
    stem, last = _ends(name, sum(len(stage) for stage in model.stages))
    reader.conv_bn("stem.branches.conv.conv", "stem.branches.conv.bn", stem)
    moments = reader.moments("stem.branches.conv.bn", model.stem.branches["conv"].bn.eps)
    moments = _after_act(*moments, model.stem.act)
    flat = 0
    for stage, blocks in enumerate(model.stages):
        for index, block in enumerate(blocks):
            moments = _take_block(reader, f"stages.{stage}.{index}.branches", block, (stage, index, flat), moments)
            flat += 1
    reader.conv_bn("last_conv.branches.conv.conv", "last_conv.branches.conv.bn", last)
    if "classifier.weight" in own:
        reader.prefix = prefix.removesuffix("backbone.")
        for key in ("weight", "bias"):
            reader.copy(f"classifier.{key}", f"{HEAD_OF[name]}.{key}", optional=True)
        reader.prefix = prefix
    reader.require_all_taken()
    for key in reader.result:
        if key.endswith(ALPHA):
            reader.result[key].zero_()
    return reader.result


def _take_block(
    reader: _Reader, key: str, block: nn.Module, place: tuple[int, int, int], moments: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill in one block; ``moments`` are those of its input. Returns those of its output."""
    chain = block.branches["bottleneck"]
    roles = [role for role in ("expand", "depthwise", "project") if hasattr(chain, role)]
    for role, names in zip(roles, _stock_layers(reader.name, *place, roles)):
        reader.conv_bn(f"{key}.bottleneck.{role}", f"{key}.bottleneck.{role}_bn", names)
    mean, var = reader.moments(f"{key}.bottleneck.project_bn", chain.project_bn.eps)
    for branch, other in block.branches.items():
        if branch == "identity":
            _set_identity(reader.result, other.bn.eps, *moments, prefix=f"{key}.identity.bn.")
            mean, var = mean + moments[0], var + moments[1]
        elif branch != "bottleneck":
            reader.result[f"{key}.{branch}.bn.weight"].zero_()
            reader.result[f"{key}.{branch}.bn.bias"].zero_()
    return mean, var


def _set_identity(result: Mapping[str, Tensor], eps: float, mean: Tensor, var: Tensor, prefix: str = "") -> None:
    """Write a BN that is the identity in eval mode; gamma follows the variance as it is after rounding."""
    result[f"{prefix}running_mean"].copy_(mean)
    result[f"{prefix}bias"].copy_(mean)
    rounded = result[f"{prefix}running_var"].copy_(var).double()
    result[f"{prefix}weight"].copy_(torch.sqrt(rounded + eps))


@torch.no_grad()
def measure_identities_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set the identity BNs' mean, var, gamma and beta from the maps that batches make of them.

    The maps are those of training: other BNs take batch statistics, and keep their own. In eval mode the model's function
    stays what it was; in train mode the skips come close to the identity. An identity BN that has learned something is left
    alone. Sums run over all processes.

    Args:
        model: holds blocks with an ``identity`` branch; changed in place.
        batches: its inputs.

    Returns:
        How many BNs were set.

    Raises:
        ArgumentError: no batch.
    """
    blocks = [m for m in model.modules() if isinstance(m, RepBlock) and not m.deployed and "identity" in m.branches]
    blocks = [b for b in blocks if hasattr(b.branches["identity"], "bn") and _is_identity(b.branches["identity"].bn)]
    bns = [block.branches["identity"].bn for block in blocks]
    sums = [torch.zeros(3, bn.num_features, dtype=torch.float64, device=bn.weight.device) for bn in bns]
    handles = [block.register_forward_pre_hook(_adder(total)) for block, total in zip(blocks, sums)]
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    trained = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    model.eval()
    for bn in trained:
        bn.training, bn.track_running_stats = bn not in bns, False
    count = 0
    try:
        for batch in batches:
            model(batch)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
        for bn in trained:
            bn.track_running_stats = True
    if not count:
        raise ArgumentError("measure_identities_ needs at least one batch, got none")
    for bn, total in zip(bns, sums):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        mean = total[0] / total[2]
        var = (total[1] / total[2] - mean**2).clamp_min(0)
        _set_identity(bn.state_dict(), bn.eps, mean, var)
    return len(bns)


def _is_identity(bn: _BatchNorm) -> bool:
    scale, shift = bn_scale_shift(bn, torch.float64)
    return bool((scale - 1).abs().max() < 1e-5 and (shift.abs() < 1e-5 * (1 + bn.running_mean.abs())).all())


def _adder(total: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A forward pre-hook that adds sum, sum of squares and number of values of its input's channels to (3, C)."""

    def add(module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].double()
        total[0] += x.sum((0, 2, 3))
        total[1] += (x * x).sum((0, 2, 3))
        total[2] += x.numel() // x.shape[1]

    return add


def adapt_state_dict_(model: nn.Module, state_dict: MutableMapping, prefix: str = "", *_) -> None:
    """Make a part of a state dict one of a RepMobileNetV2, in place; its own stays as it is.

    Stock checkpoints are translated. A plain model takes a finished anneal's checkpoint (alphas of 1 are dropped), an
    annealed one takes a plain checkpoint (alpha 1). Serves as a load_state_dict pre-hook too, where the network is a part.

    Args:
        model: the RepMobileNetV2.
        state_dict: changed in place.
        prefix: what the part's keys begin with.

    Raises:
        CheckpointMismatchError: an unfinished anneal in a plain model, or as :func:`from_stock`.
    """
    given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if stock_format(given):
        translated = from_stock(model, given)
        for key in given:
            del state_dict[f"{prefix}{key}"]
        state_dict.update({f"{prefix}{key}": value for key, value in translated.items()})
        return
    own = [name for name, _ in model.named_buffers() if name.endswith(ALPHA)]
    for key in (key for key in given if key.endswith(ALPHA) and key not in own):
        if given[key] != 1:
            raise CheckpointMismatchError(
                f"the checkpoint's {key!r} is {float(given[key]):.4g}, its anneal is not over: only "
                f"{type(model).__name__}(anneal=True, deploy=False) takes it; nothing was loaded"
            )
        del state_dict[f"{prefix}{key}"]
    blocks = {".".join(key.split(".")[:3]) for key in given}
    for key in own:
        if key not in given and ".".join(key.split(".")[:3]) in blocks:
            state_dict[f"{prefix}{key}"] = torch.ones(())
