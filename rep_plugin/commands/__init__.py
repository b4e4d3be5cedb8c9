"""The commands of ``rep-plugin``, one module each.

A module has HELP (one line), ``add_arguments(parser)`` and ``run(args)``; some have ``check_arguments(args)``, for
what argparse cannot say. They import nothing heavy but in ``run``: ``--help`` answers at once.
"""

# In the order of --help.
COMMANDS = (
    "train", "test", "experiments", "sweep", "prune", "depth", "expand", "reparameterize", "compare", "export", "save",
    "convert", "summary", "configs", "doctor", "script",
)  # fmt: skip
# These import what they need, and do without our names in timm.
LIGHT = ("configs", "convert", "doctor")
