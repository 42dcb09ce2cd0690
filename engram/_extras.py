"""Packages that only parts of the library need, and the extra of pyproject.toml that installs each."""

from __future__ import annotations

from importlib import import_module

EXTRAS = {"faiss": "pq", "matplotlib": "ablation", "PIL": "ablation", "transformers": "hf"}  # {module: extra}


def require(what: str, *modules: str) -> None:
    """Import modules of EXTRAS. what: the part of the library that needs them, for the message.

    Raises:
        ModuleNotFoundError: one is not installed; the message names the extra that installs it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise not_installed(what, error) from None


def not_installed(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error that names the extra, or the error itself if the module is not one of EXTRAS."""
    if error.name not in EXTRAS:
        return error
    return ModuleNotFoundError(
        f"{what} needs {error.name}, which is not installed: pip install -e '.[{EXTRAS[error.name]}]' in the project's "
        f"folder",
        name=error.name,
    )
