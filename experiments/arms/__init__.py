"""The arms of the lab: each a small module beside the plain transformer, whose code knows none of them.

build(name, setting, data, **options) -> a model that engram.lm's train and evaluate run unchanged; after training,
finish(name, model, setting, data, **options) -> the model to evaluate.

An arm is a file in this folder that defines ARMS, {name: build(setting, data, *, option=default) -> model}, and, for
what is done after training, FINISH, {name: finish(model, setting, data, *, option=default) -> model}.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from engram.lm.run import Data, Setting
from experiments.arms.dense import vocabulary_for

__all__ = ["NAMES", "build", "finish", "tables", "trained_as", "vocabulary_for"]

_BUILD: dict[str, Callable[..., Any]] = {}
_FINISH: dict[str, Callable[..., Any]] = {}
for _module in pkgutil.iter_modules(__path__):
    _arm = importlib.import_module(f"{__name__}.{_module.name}")
    _BUILD |= getattr(_arm, "ARMS", {})
    _FINISH |= getattr(_arm, "FINISH", {})
NAMES: tuple[str, ...] = tuple(_BUILD)


def build(name: str, setting: Setting, data: Data, **options: Any) -> nn.Module:
    """Return the untrained model of an arm. The backbone's weights depend on the seed alone if the arm keeps their
    shape.

    Options of finish() are accepted here too, so that one set of options describes a run.

    Raises:
        ValueError: an unknown arm. TypeError: an option that the arm does not have. Both list the known ones.
    """
    _check(name, options)
    return _BUILD[name](setting, data, **_of(_BUILD[name], options))


def finish(name: str, model: nn.Module, setting: Setting, data: Data, **options: Any) -> Any:
    """Return the model to evaluate, once `model` is trained: for most arms the model itself, for kneser-ney and knn-lm
    a mixture, for switched-off the model without its memory. Raises what build() raises."""
    _check(name, options)
    if name not in _FINISH:
        return model
    return _FINISH[name](model, setting, data, **_of(_FINISH[name], options))


def trained_as(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return (arm, options): the arm that stands for all that are built alike, the one that the build function is named
    after, with the options that building uses. None if nothing is trained. Raises what build() raises."""
    _check(name, options)
    base = options.get("base", "plain") if name == "kneser-ney" else name
    if base == "none":
        return None
    alike = [arm for arm in NAMES if _BUILD[arm] is _BUILD[base]]
    named = _BUILD[base].__name__.replace("_", "-")  # the arm that the function is named after stands for all
    return named if named in alike else alike[0], _of(_BUILD[base], options)


def tables(model: Any) -> dict[str, int]:
    """Return {"parameters", "bytes"} of values that are looked up and not multiplied, wherever the arm keeps them."""
    if hasattr(model, "stored"):
        return dict(model.stored)
    tables = [] if model.memory is None else model.memory.tables.values()
    return {"parameters": sum(t.rows * t.dim for t in tables), "bytes": sum(t.nbytes for t in tables)}


def _options(function: Callable[..., Any] | None) -> list[str]:
    if function is None:
        return []
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _of(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in _options(function)}


def _check(name: str, options: dict[str, Any]) -> None:
    if name not in _BUILD:
        raise ValueError(f"unknown arm {name!r}; the arms are {', '.join(NAMES)}")
    known = [*_options(_BUILD[name]), *_options(_FINISH.get(name))]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise TypeError(f"arm {name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
