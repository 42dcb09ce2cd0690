"""The code and the processor that a result comes from."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from experiments.lab.cell import HOME


def code_version() -> str:
    """Return the commit, with -dirty if the code in engram/ or experiments/ differs from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HOME, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":(top)engram", ":(top,glob)experiments/**/*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources_digest() -> str:
    """Return XXH3-64 (hex) of the code in engram/ and experiments/, which names the code even without a commit."""
    digest = xxhash.xxh3_64()
    root = HOME.parent
    files = [file for folder in ("engram", "experiments") for file in (root / folder).rglob("*") if file.is_file()]
    for file in sorted(file for file in files if file.suffix in (".py", ".c", ".h")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")  # extensions that change the order or width of sums


@lru_cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return {"name": the model name of the CPU, "extensions": those of VECTORS that it has}. Outside Linux the name is
    from `platform` and the extensions are left out."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return {"name": platform.processor() or platform.machine()}
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "extensions": [extension for extension in VECTORS if extension in flags]}
