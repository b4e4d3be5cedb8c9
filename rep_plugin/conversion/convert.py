"""Checkpoints of RepVGG, MobileOne and RepLKNet from one project's keys to another's: the same tensors, nothing lost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rep_plugin.arguments import checked
from rep_plugin.backbones import mobileone, replknet, repvgg
from rep_plugin.checkpoints.files import save_checkpoint_file, write_atomic
from rep_plugin.checkpoints.strict import describe_mismatch
from rep_plugin.checkpoints.tensors import read_tensors
from rep_plugin.conversion.key_layout import CLASSIFIER
from rep_plugin.conversion.key_maps import from_own, to_own
from rep_plugin.errors import KeyMapError

ARCHS: dict[str, Mapping] = {"repvgg": repvgg.ARCHS, "mobileone": mobileone.ARCHS, "replknet": replknet.ARCHS}
ANY_ARCH = "any"  # converts what fits none of the published archs


@dataclass(frozen=True)
class Conversion:
    """The facts of one conversion.

    Args:
        family: ``repvgg``, ``mobileone`` or ``replknet``.
        source: format of the checkpoint.
        target: format it was converted to.
        arch: the published arch (None: not one).
        deployed: in merged form.
        tensors: number of tensors.
        classifier: with its classifier.
    """

    family: str
    source: str
    target: str
    arch: str | None
    deployed: bool
    tensors: int
    classifier: bool

    def __str__(self) -> str:
        form = "merged" if self.deployed else "training"
        head = "with its classifier" if self.classifier else "without a classifier"
        name = f"{self.family} {self.arch or 'of no published arch (not checked to be whole)'}"
        return f"{name} in {form} form {head}: {self.tensors} tensors, {self.source} -> {self.target}"


def _family_of(arch: str | None) -> str | None:
    if arch in (None, ANY_ARCH):
        return None
    for family, archs in ARCHS.items():
        if arch in archs:
            return family
    names = [name for archs in ARCHS.values() for name in archs]
    raise KeyMapError(f"unknown arch {arch!r}, expected one of {', '.join(names)} or {ANY_ARCH}")


def build_like(family: str, arch: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the plain backbone, without memory (meta device), whose form a checkpoint of ours has.

    Args:
        family: ``repvgg``, ``mobileone`` or ``replknet``.
        arch: name of a published arch.
        tensors: the checkpoint, under our keys.

    Returns:
        The backbone.
    """
    deploy = any(".reparam_conv." in key for key in tensors)
    stem = "stem.0." if family == "replknet" else "stem."
    first = next((t for key, t in tensors.items() if key.startswith(stem) and t.dim() == 4), None)
    options = {"deploy": deploy, "in_channels": 3 if first is None else first.shape[1]}
    with torch.device("meta"):
        if family == "repvgg":
            return repvgg.RepVGG(arch, post_bn=any(".post_bn." in key for key in tensors), **options)
        if family == "mobileone":
            return mobileone.MobileOne(arch, **options)
        normed = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("norms.")} & set(range(4)))
        small = next((t.shape[-1] for key, t in tensors.items() if ".branches.small.conv." in key), 0)
        keep_bn = deploy and any(".branches." in key for key in tensors)
        return replknet.RepLKNet(
            arch, normed or (3,), small_kernel=small, norm_maps=bool(normed), keep_bn=keep_bn, **options
        )


def _check_arch(family: str, arch: str | None, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the published arch that a checkpoint of ours is, whole; None with ``any``. Raises KeyMapError otherwise."""
    if arch == ANY_ARCH:
        return None
    backbone = {key: tensor for key, tensor in tensors.items() if not key.startswith(CLASSIFIER)}
    misfits = {}
    for name in [arch] if arch else ARCHS[family]:
        model = build_like(family, name, backbone)
        mismatch, own = describe_mismatch(model, backbone), model.state_dict()
        if not mismatch:
            return name
        same = sum(key in own and own[key].shape == tensor.shape for key, tensor in backbone.items())
        misfits[name] = (same - len(own), mismatch)
    nearest = max(misfits, key=lambda name: misfits[name][0])
    hint = "" if arch else f"; --arch {ANY_ARCH} converts it all the same"
    raise KeyMapError(f"the tensors are no whole {family} {nearest}: {misfits[nearest][1]}{hint}")


@checked
def convert_state_dict(
    tensors: Mapping[str, Tensor], to: str = "rep_plugin", arch: str | None = None
) -> tuple[dict[str, Tensor], Conversion]:
    """Return the same tensors under the keys of another format. The source's format is recognised by its keys.

    Args:
        tensors: the checkpoint.
        to: ``rep_plugin`` (our timm names and plain backbones), ``rep_plugin_mm`` (our types in an ImageClassifier),
            ``official``, ``timm`` or ``mmpretrain``.
        arch: the published arch that it must be, whole; None: any published one; ``any``: no check.

    Returns:
        The tensors under their new keys, and the facts of the conversion.

    Raises:
        KeyMapError: the layout is unknown, ambiguous or incomplete.

    Example:
        >>> from rep_plugin.backbones.repvgg import RepVGG
        >>> tensors, conversion = convert_state_dict(RepVGG("A0").state_dict(), to="official")
        >>> conversion.arch, "stage1.0.rbr_dense.conv.weight" in tensors
        ('A0', True)
    """
    own, layout = to_own(tensors, _family_of(arch))
    found = _check_arch(layout.family, arch, own)
    new = from_own(own, layout.family, to)
    deployed = any(".reparam_conv." in key for key in own)
    classifier = any(key.startswith(CLASSIFIER) for key in own)
    return new, Conversion(layout.family, layout.format, to, found, deployed, len(new), classifier)


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write named tensors; the file is at every moment the old or the new one.

    Args:
        tensors: the tensors.
        path: the file: ``.safetensors``, or else of ``torch.save``.

    Raises:
        OSError: the file cannot be written.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save

        content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"format": "pt"})
        write_atomic(path, lambda file: file.write(content))
    else:
        save_checkpoint_file(dict(tensors), path)


@checked
def convert_file(
    source: str | os.PathLike, target: str | os.PathLike, to: str = "rep_plugin", arch: str | None = None
) -> Conversion:
    """Convert a checkpoint file, see :func:`convert_state_dict`; nothing is written where that raises.

    Args:
        source: the file to read.
        target: the file to write, another one.
        to: the format to convert to.
        arch: the published arch that it must be.

    Returns:
        The facts of the conversion.

    Raises:
        KeyMapError: the layout is unknown, ambiguous or incomplete, or both files are the same.
        UnreadableCheckpointError: the file is torn, or holds no named tensors.

    Example:
        >>> import torch
        >>> from rep_plugin.backbones.repvgg import RepVGG
        >>> torch.save(RepVGG("A0").state_dict(), "ours.pth")
        >>> convert_file("ours.pth", "official.pth", to="official").target
        'official'
    """
    if Path(target).exists() and os.path.samefile(source, target):
        raise KeyMapError(f"{target} is the checkpoint to convert, expected another file to write")
    given = read_tensors(source)
    try:
        tensors, conversion = convert_state_dict(given, to, arch)
    except KeyMapError as error:
        raise KeyMapError(f"{source}: {error}") from None
    write_tensors(tensors, target)
    return conversion
