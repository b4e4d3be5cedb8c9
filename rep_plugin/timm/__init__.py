"""The timm side: names for ``timm.create_model``, and model folders that it loads. Importing it registers the names."""

from rep_plugin.optional import require

require("timm", "timm", "rep_plugin.timm")

from rep_plugin.timm import bilinear, models, variants
from rep_plugin.timm.artefacts import save_timm

__all__ = ["bilinear", "models", "save_timm", "variants"]
