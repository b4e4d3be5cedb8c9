"""The timm side: names for ``timm.create_model``, and model folders that it loads. Importing it registers the names.

Names are registered by ``register.py``, from the tables of ``models.py``, ``variants.py`` and ``bilinear.py``.
"""

from rep_plugin.optional import require

require("timm", "timm", "rep_plugin.timm")

from rep_plugin.timm import bilinear, models, variants
from rep_plugin.timm.artefacts import save_timm
from rep_plugin.timm.export import load_timm

__all__ = ["bilinear", "load_timm", "models", "save_timm", "variants"]
