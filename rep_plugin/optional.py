"""Packages that only some rooms need, and what is said where one is not installed."""

from importlib.util import find_spec

from rep_plugin.errors import MissingPackageError


def is_missing(package: str) -> bool:
    """Return whether a package is not installed."""
    return find_spec(package) is None


def require(package: str, extra: str, needed_by: str) -> None:
    """Raise an error with the command that installs it where a package is not installed.

    Args:
        package: name of the package.
        extra: the extra of ours that installs it.
        needed_by: what needs it, for the message.

    Raises:
        MissingPackageError: it is not installed.
    """
    if is_missing(package):
        text = f"{needed_by} needs {package}, which is not installed: pip install 'rep-plugin[{extra}]'"
        raise MissingPackageError(text, name=package)
