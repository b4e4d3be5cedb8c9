"""How OpenMMLab's detectors and segmentors are run. ``import rep_plugin`` registers it, where mmengine is installed.

They are recognised by their attributes (``extract_feat``, ``roi_head``, ``auxiliary_head``): nothing of them is imported.
"""

from torch import Tensor, nn

from rep_plugin.measure.forward import Forward, register_forward


def is_two_stage(model: nn.Module) -> bool:
    """Return whether a model reads regions that it chose itself, as mmdet's Faster R-CNN does."""
    return callable(getattr(model, "extract_feat", None)) and isinstance(getattr(model, "roi_head", None), nn.Module)


class OpenMMLabForward(Forward):
    """The forward of models with ``extract_feat``.

    Which regions a two-stage detector reads is a choice: it needs meta data of the images, jumps with the last digit, and
    hides what it leaves out. So its outputs are the maps, which the second stage reads, and those of its ``rpn_head``.
    """

    def matches(self, model: nn.Module) -> bool:
        return callable(getattr(model, "extract_feat", None))

    def run(self, model: nn.Module, x: Tensor) -> object:
        if not is_two_stage(model):
            return model(x)
        maps = model.extract_feat(x)
        rpn = getattr(model, "rpn_head", None)
        return maps if rpn is None else (maps, rpn(maps))

    def run_auxiliary(self, model: nn.Module, x: Tensor) -> object:
        heads = getattr(model, "auxiliary_head", None)  # of a segmentor: one or several
        if not isinstance(heads, nn.Module):
            return self.run(model, x)
        maps = model.extract_feat(x)
        return [head(maps) for head in (heads if isinstance(heads, nn.ModuleList) else [heads])]

    def run_unreached(self, model: nn.Module, x: Tensor, unused: list[str]) -> object:
        beside = any(not name.startswith(("backbone.", "neck.")) for name in unused)
        return model.extract_feat(x) if beside else []


register_forward(OpenMMLabForward())
