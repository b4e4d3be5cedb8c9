"""Our own mmengine scope, so that ``type='rep_plugin.X'`` resolves in any config without ``custom_imports``.

mmengine imports ``<scope>.registry`` when it meets an unknown scope, and each registry imports its ``locations`` on
first use.
"""

from rep_plugin.optional import is_missing, require

require("mmengine", "openmmlab", "rep_plugin.registry")

from mmengine import registry as root
from mmengine.registry import Registry

ROOMS = ("backbones", "bilinear_pooling", "builders", "convs", "onnx_classifier")
# Types built on classes of mmpretrain, and their rooms: mmdet and mmseg are also used without it.
ON_MMPRETRAIN = {
    "BilinearClsHead": "bilinear_head",
    "TwoStreamBackbone": "bilinear_head",
    "MobileNetV2_CIFAR": "mobilenet_v2",
    "MobileNetV3_CIFAR": "mobilenet_v3",
}


class ModelRegistry(Registry):
    """A registry that says which package a type needs, where mmengine would say that there is no such type."""

    def get(self, key: str) -> type | None:
        if key in ON_MMPRETRAIN:
            require("mmpretrain", "openmmlab", f"rep_plugin.{key}")
        return super().get(key)


def _locations(*rooms: str) -> list[str]:
    return [f"rep_plugin.openmmlab.{room}" for room in rooms]


MODELS = ModelRegistry(
    "model",
    parent=root.MODELS,
    scope="rep_plugin",
    locations=_locations(*ROOMS, *(() if is_missing("mmpretrain") else sorted(set(ON_MMPRETRAIN.values())))),
)
HOOKS = Registry("hook", parent=root.HOOKS, scope="rep_plugin", locations=_locations("hooks"))
OPTIM_WRAPPERS = Registry("optim_wrapper", parent=root.OPTIM_WRAPPERS, scope="rep_plugin", locations=_locations("amp"))
