"""`engram ...`: the command line. Every command calls the function of the library with the same name; `engram inspect`
calls inspect_file, because `engram.inspect` is a package."""

from __future__ import annotations

import sys
import warnings

from engram.cli import training, models, files  # isort: skip  # the order of the commands in --help
from engram._extras import EXTRAS
from engram.cli.options import app
from engram.storage.untrusted import printable

__all__ = ["app", "files", "main", "models", "training"]


def main() -> None:
    """Run the command line. An error of the input is printed as one line on stderr, with exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, IndexError, FloatingPointError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name not in EXTRAS:
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
