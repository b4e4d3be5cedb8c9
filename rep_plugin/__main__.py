"""Run a script with our names registered in timm: ``python -m rep_plugin train.py PICTURES --model rep_mobilenetv2_050``.

timm's own ``train.py`` and ``validate.py`` (in its repository, not in its package) have no flag that imports another
package. With several processes:
``torchrun --nproc_per_node 2 -m rep_plugin train.py ...``.
"""

import runpy
import sys
from pathlib import Path

import rep_plugin as rep_plugin


def main(arguments: list[str]) -> None:
    """Run ``arguments[0]`` as Python would, with the rest as its command line. Exits with a line where it is no file."""
    if not arguments or not Path(arguments[0]).is_file():
        raise SystemExit(
            f"usage: python -m rep_plugin SCRIPT.py ARGUMENTS; no such script: {' '.join(arguments[:1])!r} (timm's "
            "train.py and validate.py are in its repository, not in its package)"
        )
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
