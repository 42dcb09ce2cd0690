"""Which code a result comes from."""

from __future__ import annotations

import subprocess

import xxhash

from experiments.config import HOME


def code_version() -> str:
    """The commit, with -dirty where the code in engram/ or experiments/ is not the commit's; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HOME, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":(top)engram", ":(top,glob)experiments/**/*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources_digest() -> str:
    """XXH3-64 (hex) of the code in engram/ and experiments/: says which code ran where there is no commit to name."""
    digest = xxhash.xxh3_64()
    root = HOME.parent
    files = [file for folder in ("engram", "experiments") for file in (root / folder).rglob("*") if file.is_file()]
    for file in sorted(file for file in files if file.suffix in (".py", ".c", ".h")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
