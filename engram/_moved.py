"""Old import paths: each still works for one version, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "engram.benchmarks.rows": "engram.benchmarks.gather_update",
    "engram.cache": "engram.memory.cache",
    "engram.inspect.show": "engram.inspect.render",
    "engram.integrations.attach": "engram.integrations.transformers.attach",
    "engram.integrations.decoding": "engram.integrations.transformers.decoding",
    "engram.integrations.dialects": "engram.integrations.formats.dialects",
    "engram.integrations.gguf": "engram.integrations.formats.gguf",
    "engram.integrations.inputs": "engram.integrations.transformers.inputs",
    "engram.integrations.offload": "engram.integrations.transformers.offload",
    "engram.integrations.pretrained": "engram.integrations.transformers.pretrained",
    "engram.integrations.rows": "engram.integrations.formats.stored_rows",
    "engram.integrations.sources": "engram.integrations.formats.readers",
    "engram.integrations.targets": "engram.integrations.formats.writers",
    "engram.integrations.tensors": "engram.integrations.formats.safetensors_io",
    "engram.integrations.trainer": "engram.integrations.transformers.trainer",
    "engram.lm.ablate": "engram.ablation.ablate",
    "engram.lm.figure": "engram.ablation.figure",
    "engram.lm.harness": "engram.lm.lm_eval",
    "engram.lm.page": "engram.ablation.html_report",
    "engram.lm.report": "engram.ablation.tables",
    "engram.lm.seen": "engram.ablation.ngram_counts",
    "engram.lm.statistics": "engram.ablation.statistics",
    "engram.recall": "engram.memory.recall",
    "engram.saved": "engram.memory.saved",
    "engram.state": "engram.memory.state",
    "engram.tables.files": "engram.storage.files",
    "engram.tables.limits": "engram.storage.limits",
    "engram.tables.mapping": "engram.storage.mapping",
    "engram.tables.readahead": "engram.storage.readahead",
    "engram.tables.sinkhorn": "engram.tables.optimizers.sinkhorn",
    "engram.tables.weak": "engram.storage.weak",
    "engram.untrusted": "engram.storage.untrusted",
}

_PARTS_OF_FILES = (
    "engram.storage.folders",
    "engram.storage.locks",
    "engram.storage.manifest",
    "engram.storage.partial",
)
SPLIT = {  # where other names of an old module now live
    "engram.integrations.gguf": ("engram.integrations.formats.gguf_memory",),
    "engram.integrations.attach": (
        "engram.integrations.transformers.architecture",
        "engram.integrations.transformers.hooks",
    ),
    "engram.integrations.pretrained": ("engram.integrations.transformers.model_folder",),
    "engram.integrations.targets": ("engram.integrations.formats.recoder",),
    "engram.lm.report": ("engram.lm.units",),
    "engram.integrations.rows": ("engram.integrations.formats.scales",),
    "engram.integrations.sources": ("engram.integrations.formats.fusion_weights",),
    "engram.saved": ("engram.memory.saved_manifest",),
    "engram.tables.files": _PARTS_OF_FILES,
}

LEFT = {"engram.storage.files": _PARTS_OF_FILES}  # a module that still exists: where names that left it now live


class _Moved(MetaPathFinder, Loader):
    """Finder of the modules in MOVED, used after the usual finders have failed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} has moved to {new}: change the import, the old path ends with the next version",
            DeprecationWarning,
            stacklevel=_frames_of_import(),
        )
        homes = [import_module(home) for home in (new, *SPLIT.get(module.__name__, ()))]
        module.__getattr__ = partial(_find, homes)  # type: ignore[method-assign]


def _find(homes: Sequence[ModuleType], name: str) -> Any:
    """Return the attribute of the first module that has it; the first one raises if none has."""
    return getattr(next((home for home in homes if name in vars(home)), homes[0]), name)


def moved_name(module: str, name: str) -> Any:
    """Return a public name that has left `module` for one of the modules in LEFT, with a DeprecationWarning.

    Raises:
        AttributeError: none of them defines it.
    """
    for home in () if name.startswith("_") else map(import_module, LEFT[module]):
        value = vars(home).get(name)
        if getattr(value, "__module__", None) == home.__name__:
            warnings.warn(
                f"{module}.{name} has moved to {home.__name__}: change the import, the old path ends with the next "
                f"version",
                DeprecationWarning,
                stacklevel=3,
            )
            return value
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _frames_of_import() -> int:
    """Count the frames between exec_module and the import statement that caused it, as warnings.warn counts them
    (without those of importlib._bootstrap)."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        level, frame = level + ("_bootstrap" not in frame.f_code.co_filename), frame.f_back
    return level


def install() -> None:
    """Add the finder of the old paths to sys.meta_path, once."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
