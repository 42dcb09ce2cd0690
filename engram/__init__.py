"""engram: hashed n-gram tables in host memory, looked up from token ids alone and gated into a transformer.

Every public name is imported on its first use, so that `import engram` takes milliseconds: torch, transformers and the
libraries of the command line and of figures are imported by the names that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engram import _command, _moved  # noqa: F401  (first: _command must run before torch is imported)

if TYPE_CHECKING:
    from engram import ablation as ablation
    from engram import addressing as addressing
    from engram import benchmarks as benchmarks
    from engram import config as config
    from engram import counts as counts
    from engram import fusion as fusion
    from engram import inspect as inspect
    from engram import integrations as integrations
    from engram import lm as lm
    from engram import memory as memory
    from engram import optimizer as optimizer
    from engram import storage as storage
    from engram import tables as tables
    from engram.ablation.ablate import ablate
    from engram.addressing import HashLayout, NgramHasher, TokenMap
    from engram.benchmarks import bench
    from engram.config import EngramConfig
    from engram.counts import CountMemory
    from engram.inspect.explain import explain
    from engram.inspect.plan import plan
    from engram.integrations.formats import convert, inspect_file, open_tables
    from engram.integrations.transformers.attach import attach, detach
    from engram.integrations.transformers.offload import offload
    from engram.integrations.transformers.pretrained import from_pretrained, load_pretrained
    from engram.integrations.transformers.trainer import MemoryCallback
    from engram.lm.evaluate import evaluate
    from engram.lm.generate import generate
    from engram.lm.run import load_run
    from engram.lm.train import train
    from engram.lm.transformer import Transformer, TransformerConfig
    from engram.memory import EngramMemory
    from engram.optimizer import build_optimizer
    from engram.storage.manifest import verify
    from engram.tables import HostTable

    __version__: str

_moved.install()

__all__ = [
    "CountMemory",
    "EngramConfig",
    "EngramMemory",
    "HashLayout",
    "HostTable",
    "MemoryCallback",
    "NgramHasher",
    "TokenMap",
    "Transformer",
    "TransformerConfig",
    "ablate",
    "attach",
    "bench",
    "build_optimizer",
    "convert",
    "detach",
    "evaluate",
    "explain",
    "from_pretrained",
    "generate",
    "inspect_file",
    "load_pretrained",
    "load_run",
    "offload",
    "open_tables",
    "plan",
    "train",
    "verify",
]

_HOME = {  # public name -> module that defines it
    "CountMemory": "engram.counts",
    "EngramConfig": "engram.config",
    "EngramMemory": "engram.memory",
    "HashLayout": "engram.addressing",
    "HostTable": "engram.tables",
    "MemoryCallback": "engram.integrations.transformers.trainer",
    "NgramHasher": "engram.addressing",
    "TokenMap": "engram.addressing",
    "Transformer": "engram.lm.transformer",
    "TransformerConfig": "engram.lm.transformer",
    "ablate": "engram.ablation.ablate",
    "attach": "engram.integrations.transformers.attach",
    "bench": "engram.benchmarks",
    "build_optimizer": "engram.optimizer",
    "convert": "engram.integrations.formats",
    "detach": "engram.integrations.transformers.attach",
    "evaluate": "engram.lm.evaluate",
    "explain": "engram.inspect.explain",
    "from_pretrained": "engram.integrations.transformers.pretrained",
    "generate": "engram.lm.generate",
    "inspect_file": "engram.integrations.formats",
    "load_pretrained": "engram.integrations.transformers.pretrained",
    "load_run": "engram.lm.run",
    "offload": "engram.integrations.transformers.offload",
    "open_tables": "engram.integrations.formats",
    "plan": "engram.inspect.plan",
    "train": "engram.lm.train",
    "verify": "engram.storage.manifest",
}
_ROOMS = (
    "ablation",
    "addressing",
    "benchmarks",
    "config",
    "counts",
    "fusion",
    "inspect",
    "integrations",
    "lm",
    "memory",
    "optimizer",
    "storage",
    "tables",
)


def _load(name: str) -> Any:
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from engram._extras import not_installed

        raise not_installed(f"engram.{name}", error) from None


if not TYPE_CHECKING:  # with it, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """Import a public name or a subpackage on its first use."""
        if name in _HOME:
            value = _load(name)
        elif name in _ROOMS:
            return import_module(f"engram.{name}")
        elif name == "__version__":
            from engram._version import installed_version

            value = installed_version()
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, "__version__"})
