"""Where every timm name of ours is registered: the tables of models, variants and bilinear call :func:`register`.

(The one name outside of a table, ``rep_rebuilt``, stands in artefacts.)
"""

import sys
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

from rep_plugin.arguments import Channels, Classes, Fraction, check

# Arguments of all names; a network checks its own.
OPTIONS = {
    "num_classes": Classes,
    "in_chans": Channels,
    "drop_rate": Fraction,
    **dict.fromkeys(("deploy", "online", "anneal", "keep_bn", "features_only"), bool),
}


def register(module: str, name: str, create: Callable[..., nn.Module], cfg: dict, description: str) -> None:
    """Make ``timm.create_model(name)`` call ``create(name, pretrained, **kwargs)``.

    Args:
        module: the caller's ``__name__``; timm lists a model under the file that it comes from.
        name: timm's name of the model.
        create: builds the model.
        cfg: timm's description of the input and of the layers that it replaces, see :func:`pretrained_cfg`.
        description: docstring of the entry.
    """

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        given = {key: check(key, value, OPTIONS.get(key, Any)) for key, value in kwargs.items()}
        return create(name, check("pretrained", pretrained, bool), **given)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__, entry.__doc__ = module, description
    table = vars(sys.modules[module])
    table.setdefault("default_cfgs", {}).update(generate_default_cfgs({f"{name}.untrained": cfg}))
    table[name] = register_model(entry)


def pretrained_cfg(first_conv: str | tuple[str, ...], **changes) -> dict:
    """Return a ``default_cfgs`` entry: ImageNet's 224x224 images, no weights to download.

    Args:
        first_conv: name of the convolution, or convolutions, that read the image.
        **changes: other values than those.

    Returns:
        What timm's ``pretrained_cfg`` holds.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "classifier",
        "license": "apache-2.0",
        **changes,
    }


def name_first_conv_(options: dict, first_conv: str | tuple[str, ...]) -> None:
    """Let the ``pretrained_cfg`` of a model that is built deployed name the convolution that it has.

    Args:
        options: what ``build_model_with_cfg`` is called with.
        first_conv: name of that convolution.
    """
    given = options.get("pretrained_cfg_overlay") or {}
    options["pretrained_cfg_overlay"] = {"first_conv": first_conv, **given}
