"""The version of the package, where modules below engram/__init__.py can read it."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Return the version of the installed package, "0+source" if it runs from its source."""
    try:
        return version("engram-lm")
    except PackageNotFoundError:
        return "0+source"
