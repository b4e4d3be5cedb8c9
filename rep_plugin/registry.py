"""Our own mmengine scope, so that ``type='rep_plugin.X'`` resolves in any config without ``custom_imports``.

mmengine imports ``<scope>.registry`` when it meets an unknown scope, and each registry imports its ``locations`` on
first use.
"""

from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    "model",
    parent=ROOT_MODELS,
    scope="rep_plugin",
    locations=[f"rep_plugin.mm_{name}" for name in ("models", "backbones", "bilinear", "convs", "expand", "pruned")],
)
HOOKS = Registry("hook", parent=ROOT_HOOKS, scope="rep_plugin", locations=["rep_plugin.hooks"])
OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=ROOT_OPTIM_WRAPPERS, scope="rep_plugin", locations=["rep_plugin.mm_amp"]
)
