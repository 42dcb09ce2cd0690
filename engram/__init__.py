"""engram: hashed n-gram tables in host memory, looked up from token ids alone and gated into a transformer."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engram import _command, _moved  # noqa: F401  (first: _command must run before torch is imported)
from engram.ablation.ablate import ablate
from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.benchmarks import bench
from engram.config import EngramConfig
from engram.inspect.explain import explain
from engram.inspect.plan import plan
from engram.integrations.formats import convert
from engram.integrations.transformers.offload import offload
from engram.lm.evaluate import evaluate
from engram.lm.generate import generate
from engram.lm.train import train
from engram.lm.transformer import Transformer, TransformerConfig
from engram.memory import EngramMemory
from engram.optimizer import build_optimizer
from engram.tables import HostTable

_moved.install()
try:
    __version__ = version("engram-lm")
except PackageNotFoundError:  # run from its source, not installed
    __version__ = "0+source"

__all__ = [
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
    "offload",
    "plan",
    "train",
]

_LAZY = {"attach": "attach", "detach": "attach", "from_pretrained": "pretrained", "MemoryCallback": "trainer"}


def __getattr__(name: str) -> Any:
    """Names of _LAZY on first use: they import transformers, which nothing else here needs."""
    if name in _LAZY:
        try:
            module = import_module(f"engram.integrations.transformers.{_LAZY[name]}")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ModuleNotFoundError(
                f"engram.{name} needs transformers, which is not installed: pip install -e '.[hf]' in the project's "
                f"folder",
                name="transformers",
            ) from None

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
