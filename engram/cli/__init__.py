"""`engram ...`: thin. Every command is a function of the library with the same name."""

from __future__ import annotations

import sys
import warnings

from engram.cli import training, models, files  # isort: skip  # the order of the commands in --help
from engram.cli.options import app
from engram.storage.untrusted import printable

__all__ = ["app", "files", "main", "models", "training"]


def main() -> None:
    """Entry point: what is wrong with the input is one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, IndexError, FloatingPointError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
