"""How a model is run on pictures alone: ``model(x)``, and what OpenMMLab's detectors and segmentors need beside it.

They are told by what they have (``extract_feat``, ``roi_head``, ``auxiliary_head``), so that nothing of them is imported.
"""

from torch import Tensor, nn


def is_two_stage(model: nn.Module) -> bool:
    """Whether a model looks at regions that it chose itself, as mmdet's Faster R-CNN does."""
    return callable(getattr(model, "extract_feat", None)) and isinstance(getattr(model, "roi_head", None), nn.Module)


def run_model(model: nn.Module, x: Tensor) -> object:
    """Return ``model(x)``; of a two-stage detector the maps of ``extract_feat`` and what its ``rpn_head`` makes of them.

    Which regions such a detector looks at is a choice: it needs meta data of the pictures, jumps with the last digit, and
    hides what it leaves out. The maps, which the second stage reads, are the whole of what it is given.
    """
    if not is_two_stage(model):
        return model(x)
    maps = model.extract_feat(x)
    rpn = getattr(model, "rpn_head", None)
    return maps if rpn is None else (maps, rpn(maps))


def run_auxiliary(model: nn.Module, x: Tensor) -> object:
    """Return what training looks at: the outputs of a segmentor's ``auxiliary_head`` (one or several), else ``model(x)``."""
    heads = getattr(model, "auxiliary_head", None)
    if not isinstance(heads, nn.Module) or not callable(getattr(model, "extract_feat", None)):
        return run_model(model, x)
    maps = model.extract_feat(x)
    return [head(maps) for head in (heads if isinstance(heads, nn.ModuleList) else [heads])]


def run_to_maps(model: nn.Module, x: Tensor) -> object:
    """Return the maps of ``extract_feat``, which every head of an OpenMMLab model reads."""
    return model.extract_feat(x)


def heads_not_run(model: nn.Module, unused: list[str]) -> bool:
    """Whether parameters that no run used may belong to heads that read the maps: any outside backbone and neck."""
    return callable(getattr(model, "extract_feat", None)) and any(
        not name.startswith(("backbone.", "neck.")) for name in unused
    )
