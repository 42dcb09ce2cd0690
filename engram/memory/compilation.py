"""Calls that torch.compile must leave alone, and those that cannot be recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor


def uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude a method from torch.compile (threads, C, host memory): a compiled graph breaks there. Importing
    torch._dynamo takes seconds, so it is used only if it is already imported."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return update_wrapper(call, method)


def refuse_recording(value: Any) -> None:
    """Raise RuntimeError if torch records or transforms operations on `value`: rows are looked up outside of torch, so
    a recorded program would hold the rows of these ids as constants."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    how = None
    if torch.jit.is_tracing():
        how = "torch.jit.trace"
    elif torch.compiler.is_exporting():
        how = "torch.export"
    elif type(value).__module__.startswith("torch.fx.proxy"):
        how = "torch.fx.symbolic_trace"
    elif proxies is not None and proxies.get_proxy_mode() is not None:
        how = "make_fx"
    elif isinstance(value, Tensor):
        try:
            value.flatten()[:0].clone().data_ptr()
        except RuntimeError:
            how = "a transform of torch.func (vmap, grad) or a fake tensor mode"
    if how is not None:
        raise RuntimeError(
            f"{how} records or transforms operations of torch, but the rows of an n-gram memory are looked up outside "
            f"of torch: the result would read the rows of other ids. Run the model as it is (torch.compile works), or "
            f"detach the memory first"
        )
