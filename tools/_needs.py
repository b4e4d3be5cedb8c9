"""Imported first by tools that need OpenMMLab: ends with the line that says so where it is not installed."""

import sys
from pathlib import Path

from rep_plugin.missing import explain, is_missing

for _package in ("mmengine", "mmcv", "mmpretrain"):
    if is_missing(_package):
        sys.exit(f"error: {explain(Path(sys.argv[0]).name, _package, 'openmmlab')}")
