"""The arms: what is trained in place of, or beside, the memory. build(name, ...) makes the model of one."""

from __future__ import annotations

from typing import Any

from torch import nn

from engram.lm.run import Data, Setting, build_model
from engram.memory import EngramMemory

NAMES: tuple[str, ...] = ("plain", "engram", "one-row", "random")


def build(name: str, setting: Setting, data: Data, **options: Any) -> nn.Module:
    """The untrained model of one arm."""
    if options:
        raise TypeError(f"arm {name!r} has no option {', '.join(options)}")
    return build_model(setting, name, data.token_map)


def finish(name: str, model: nn.Module, setting: Setting, data: Data, **options: Any) -> nn.Module:
    """What remains to be done after training: nothing for these arms."""
    return model


def tables(model: nn.Module) -> dict[str, int]:
    """Parameters that are looked up and not multiplied, and their bytes."""
    memories = [module for module in model.modules() if isinstance(module, EngramMemory)]
    return {
        "parameters": sum(memory.table_parameters() for memory in memories),
        "bytes": sum(table.nbytes for memory in memories for table in memory.tables.values()),
    }


def vocabulary_for(setting: Setting) -> int:
    """Entries of the arm larger-vocabulary."""
    return 4 * setting.vocab_size
