"""Where other projects' checkpoints keep what our backbones keep: RepVGG, MobileOne and RepLKNet of the authors
(DingXiaoH/RepVGG, apple/ml-mobileone, DingXiaoH/RepLKNet-pytorch), of timm and of mmpretrain, in training and merged form.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from rep_plugin.conversion.key_layout import CLASSIFIER, Layout, Pair
from rep_plugin.errors import KeyMapError

FORMATS = ("rep_plugin", "rep_plugin_mm", "official", "timm", "mmpretrain")
FAMILIES = ("repvgg", "mobileone", "replknet")


def _conv_bn(theirs: str, ours: str, bn: str = "bn") -> list[Pair]:
    return [(f"{theirs}conv.weight", f"{ours}conv.weight"), (f"{theirs}{bn}.", f"{ours}bn.")]


def _everywhere(places: Iterable[Pair], parts: Iterable[Pair]) -> tuple[Pair, ...]:
    return tuple((place[0] + part[0], place[1] + part[1]) for place in places for part in parts)


_OWN_STAGES = [("stem.", "stem."), ("stages.{s}.{b}.", "stages.{s}.{b}.")]
_STAGES_FROM_1 = [("stage0.", "stem."), ("stage{s+1}.{b}.", "stages.{s}.{b}.")]


def _branched(family: str, format: str, stages: Iterable[Pair], block: str, attention: str) -> Layout:
    """RepVGG or MobileOne. ``block``: two kinds of convolutions, the identity, what they merge to; all names of theirs."""
    kernel, other, identity, merged = block.split()
    reduce, expand = attention.split()
    ours = {"repvgg": ("conv", "point"), "mobileone": ("conv{n}", "scale")}[family]
    is_mm = format == "mmpretrain"
    parts = [
        *_conv_bn(f"{kernel}.", f"branches.{ours[0]}.", "norm" if is_mm else "bn"),
        *_conv_bn(f"{other}.", f"branches.{ours[1]}.", "norm" if is_mm else "bn"),
        (f"{identity}.", "branches.identity.bn."),
        (f"{merged}.", "reparam_conv."),
        (f"{reduce}.", "act.se.reduce."),
        (f"{expand}.", "act.se.expand."),
    ]
    head = "linear." if format == "official" else "head.fc."
    return Layout(family, format, _everywhere(stages, parts), head, wrapped=is_mm)


def _replknet(norms: list[Pair], fused: bool) -> tuple[Pair, ...]:
    """``fused``: the authors' form without any BN behind a convolution."""

    def plain(theirs: str, ours: str) -> list[Pair]:
        return [(f"{theirs}conv.", f"{ours}reparam_conv.")] if fused else _conv_bn(theirs, f"{ours}branches.conv.")

    block = [
        ("prelkb_bn.", "norm."),
        ("preffn_bn.", "ffn_norm."),
        *plain("pw1.", "pw1."),
        *plain("pw2.", "pw2."),
        *_conv_bn("large_kernel.lkb_origin.", "large.branches.large."),
        *_conv_bn("large_kernel.small_conv.", "large.branches.small."),
        ("large_kernel.lkb_reparam.", "large.reparam_conv."),
    ]
    return (
        *plain("stem.{i}.", "stem.{i}."),
        *_everywhere([("stages.{s}.blocks.{b}.", "stages.{s}.{b}.")], block),
        *plain("transitions.{s}.{i}.", "stages.{s+1}.transition.{i}."),
        *norms,
    )


_LAST_NORM, _STAGE_NORMS = [("norm.", "norms.3.")], [("stages.{s}.norm.", "norms.{s}.")]
_FOREIGN = [
    _branched("repvgg", "official", _STAGES_FROM_1, "rbr_dense rbr_1x1 rbr_identity rbr_reparam", "se.down se.up"),
    _branched("repvgg", "timm", _OWN_STAGES, "conv_kxk conv_1x1 identity reparam_conv", "attn.fc1 attn.fc2"),
    _branched("repvgg", "mmpretrain", [("stem.", "stem."), ("stage_{s+1}.{b}.", "stages.{s}.{b}.")],
              "branch_3x3 branch_1x1 branch_norm branch_reparam", "se_layer.conv1.conv se_layer.conv2.conv"),
    _branched("mobileone", "official", _STAGES_FROM_1,
              "rbr_conv.{n} rbr_scale rbr_skip reparam_conv", "se.reduce se.expand"),
    _branched("mobileone", "timm", _OWN_STAGES, "conv_kxk.{n} conv_scale identity reparam_conv", "attn.fc1 attn.fc2"),
    _branched("mobileone", "mmpretrain", _STAGES_FROM_1,
              "branch_conv_list.{n} branch_scale branch_norm branch_reparam", "se.conv1.conv se.conv2.conv"),
    *(
        Layout("replknet", "official", _replknet(norms, fused), "head.")
        for fused in (False, True)
        for norms in (_LAST_NORM, _STAGE_NORMS)
    ),
    Layout("replknet", "mmpretrain", _replknet(_STAGE_NORMS, False), "head.fc.", wrapped=True),
]  # fmt: skip


def _own(family: str, format: str, head: str, wrapped: bool) -> Layout:
    ours = {ours for layout in _FOREIGN if layout.family == family for _, ours in layout.pairs}
    if family == "repvgg":
        ours |= {f"{place}post_bn." for place, _ in _OWN_STAGES}
    return Layout(family, format, tuple((key, key) for key in sorted(ours)), head, wrapped)


LAYOUTS = [
    *(_own(family, "rep_plugin", CLASSIFIER, False) for family in FAMILIES),
    *_FOREIGN,
    *(_own(family, "rep_plugin_mm", "head.fc.", True) for family in FAMILIES),
]


def _looks_like(family: str, tensors: Mapping[str, Tensor]) -> bool:
    """Merged RepVGG and MobileOne have the same names at timm and here; only MobileOne has 1x1 kernels."""
    pointwise = any(key.endswith(".reparam_conv.weight") and t.shape[2:] == (1, 1) for key, t in tensors.items())
    return pointwise == (family == "mobileone")


def to_own(tensors: Mapping[str, Tensor], family: str | None = None) -> tuple[dict[str, Tensor], Layout]:
    """Return a checkpoint under our own keys (``rep_plugin``), and the layout it had.

    Args:
        tensors: the checkpoint.
        family: limits the search to ``repvgg``, ``mobileone`` or ``replknet``.

    Returns:
        The tensors, and the layout.

    Raises:
        KeyMapError: no layout, or more than one, has all of the keys.
    """
    if not tensors:
        raise KeyMapError("the checkpoint is empty, expected the tensors of a RepVGG, MobileOne or RepLKNet")
    fits, closest = [], (0, "", None)
    for layout in LAYOUTS:
        if family not in (None, layout.family):
            continue
        found, unknown = layout.read(tensors)
        if unknown is not None:
            closest = max(closest, (len(found), unknown, layout), key=lambda entry: entry[0])
        elif not any(layout.family == other.family and found == same for other, same in fits):
            fits.append((layout, found))
    if {layout.family for layout, _ in fits} == {"repvgg", "mobileone"}:
        fits = [(layout, found) for layout, found in fits if _looks_like(layout.family, tensors)]
    if len(fits) > 1:
        names = " and ".join(f"{layout.family} of {layout.format}" for layout, _ in fits)
        raise KeyMapError(f"the checkpoint is ambiguous: its keys are those of {names}")
    if not fits:
        count, unknown, layout = closest
        guess = f"{layout.family} of {layout.format} has no such key, though it has {count} before it" if layout else ""
        unknown = unknown or next(iter(tensors))
        raise KeyMapError(
            f"unknown checkpoint layout: key {unknown!r} of {len(tensors)}; {guess or 'no layout has it'}"
        )
    layout, found = fits[0]
    return {found[key]: tensor for key, tensor in tensors.items()}, layout


def from_own(tensors: Mapping[str, Tensor], family: str, to: str) -> dict[str, Tensor]:
    """Return a checkpoint of ours under the keys of another format.

    Args:
        tensors: the checkpoint, under our keys.
        family: ``repvgg``, ``mobileone`` or ``replknet``.
        to: one of FORMATS.

    Returns:
        The tensors.

    Raises:
        KeyMapError: the format is unknown, the family is not in it, or a key has no counterpart there.
    """
    if to not in FORMATS:
        raise KeyMapError(f"unknown format {to!r}, expected one of {', '.join(FORMATS)}")
    layouts = [layout for layout in LAYOUTS if (layout.family, layout.format) == (family, to)]
    if not layouts:
        raise KeyMapError(f"{to} has no {family}: there is no layout to write")
    unknown = None
    for layout in layouts:
        found, unknown = layout.write(tensors)
        if unknown is None:
            return {found[key]: tensor for key, tensor in tensors.items()}
    raise KeyMapError(f"{unknown!r} has no counterpart in the {to} layout of {family}")
