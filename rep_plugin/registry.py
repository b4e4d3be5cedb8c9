"""Our own mmengine scope, so that ``type='rep_plugin.X'`` resolves in any config without ``custom_imports``.

mmengine imports ``<scope>.registry`` when it meets an unknown scope, and each registry imports its ``locations`` on
first use. What is built on mmpretrain's own classes is refused by name where mmdet or mmseg are used without mmpretrain.
"""

from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import Registry

from rep_plugin.missing import explain, is_missing

ON_MMPRETRAIN = [] if is_missing("mmpretrain") else ["bilinear", "mobilenet_v3"]
MODELS = Registry(
    "model",
    parent=ROOT_MODELS,
    scope="rep_plugin",
    locations=[
        f"rep_plugin.mm_{name}" for name in ("models", "backbones", "convs", "expand", "pruned", *ON_MMPRETRAIN)
    ],
)
HOOKS = Registry("hook", parent=ROOT_HOOKS, scope="rep_plugin", locations=["rep_plugin.hooks"])
OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=ROOT_OPTIM_WRAPPERS, scope="rep_plugin", locations=["rep_plugin.mm_amp"]
)


def _refused(name: str):
    def build(**_):
        raise explain(f"rep_plugin.{name}", "mmpretrain", "openmmlab")

    return build


if not ON_MMPRETRAIN:
    for _name in ("BilinearPooling", "BilinearClsHead", "TwoStreamBackbone", "MobileNetV3_CIFAR"):
        MODELS.register_module(_name, module=_refused(_name))
