"""The hooks of an attached memory.

Two kinds of hooks do it. One sits on the decoder and on the models around it: it receives the input ids of a forward
pass and starts to fetch their rows. The other sits on each decoder layer that has a table, and adds the memory's update
to the hidden state before the layer runs. Gradient checkpointing recomputes a layer's forward(), not its hooks, so rows
are recalled once.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from engram.integrations.transformers.architecture import device_of_layer
from engram.integrations.transformers.decoding import CACHE_NAMES, cache_argument, follow, positions, state_of, suspend
from engram.integrations.transformers.inputs import documents, padding, placeholder_ids, vocabulary
from engram.integrations.transformers.model_folder import SavePretrained
from engram.memory.cache import MemoryCache
from engram.memory.compilation import refuse_recording, uncompiled
from engram.memory.recall import Recall

_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q")
_numbers = itertools.count(1)


@dataclass
class _Call:
    """A call of the decoder or of a model around it.

    Attributes:
        frame: of torch, which runs until the call ends.
        arguments: those of _READ, and the cache as "cache", whatever the model calls that argument.
        recall: rows of this call; only of the decoder.
        cache: where the decoder's keys and values go, if the call has one.
    """

    frame: FrameType
    module: nn.Module
    arguments: dict[str, Any]
    recall: Recall | None = None
    cache: Cache | None = None


class _Calls(threading.local):
    """Running calls of this thread, the outermost first. Other threads may run the same model meanwhile.

    torch runs no hook after a forward pass that KeyboardInterrupt, GeneratorExit or the like ended, nor after one that
    failed within a compiled model. So a call counts only as long as its frame is on the stack.
    """

    def __init__(self) -> None:
        self.all: list[_Call] = []

    def enter(self, call: _Call) -> None:
        self.all = [c for c in self.all if _is_running(c.frame)] + [call]

    def leave(self, module: nn.Module) -> _Call | None:
        """Remove and return the innermost call of a model."""
        position = next((i for i in reversed(range(len(self.all))) if self.all[i].module is module), None)
        return None if position is None else self.all.pop(position)


def _calling_frame() -> FrameType:
    """Return the frame in which torch runs the hooks and forward() of the module whose hook calls this."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") != nn.Module.__module__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType) -> bool:
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


class _Hook:
    """A method of an attachment as a hook. A copy of the model gets hooks of its own copy of the attachment."""

    def __init__(self, attachment: Attachment, method: str, *first: Any):
        self.attachment, self.method, self.first = attachment, method, first
        self.call = uncompiled(partial(getattr(attachment, method), *first))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(copy.deepcopy(self.attachment, memo), self.method, *self.first)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model with an attached memory is not pickled: its tables may be larger than memory. Save it with "
            "model.save_pretrained(folder), the memory alone with memory.save(folder), or the values with "
            "torch.save(model.state_dict()); copy.deepcopy copies it"
        )


class Attachment:
    """The hooks of one attached memory."""

    def __init__(
        self, model: nn.Module, root: PreTrainedModel, decoder: PreTrainedModel, layers: nn.ModuleList, memory: Any
    ):
        self.model, self.decoder, self.memory = model, decoder, memory
        self.number = next(_numbers)  # by which a cache, also a copied one, names the attachment it belongs to
        self.calls = _Calls()
        self.dead_ids = placeholder_ids(root.config)
        # Layers of PEFT that the model had before the memory, which is then off wherever they are disabled.
        self.adapters = [m for m in root.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
        around = [m for m in root.modules() if isinstance(m, PreTrainedModel) and decoder in m.modules()]
        self.models = around[::-1]  # the decoder first, the outermost last
        self.names: dict[nn.Module, tuple[str, ...]] = {
            m: tuple(inspect.signature(m.forward).parameters) for m in self.models
        }
        # The name in the signature first. Older names are accepted beside it, and renamed within forward().
        self.caches: dict[nn.Module, list[str]] = {
            m: [name for name in (cache_argument(m), *CACHE_NAMES) if name is not None] for m in self.models
        }
        self.handles = []
        for m in self.models:
            m.save_pretrained = SavePretrained(self, m)  # type: ignore[method-assign]
            self.handles.append(m.register_forward_pre_hook(_Hook(self, "_enter"), with_kwargs=True))
            self.handles.append(m.register_forward_hook(_Hook(self, "_leave"), always_call=True))
        for layer in memory.config.layers:
            self.handles.append(layers[layer].register_forward_pre_hook(_Hook(self, "_add", layer), with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for m in self.models:
            del m.save_pretrained
        del self.decoder.engram

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Return the attachment of a copy of its models, or itself if only parts of them are copied."""
        top = next((m for m in reversed(self.models) if id(m) in memo), None)
        if top is None:
            return self
        twin = memo[id(self)] = object.__new__(Attachment)
        inner = set(top.modules())
        dicts = {id(d) for m in inner for d in (m._forward_pre_hooks, m._forward_hooks)}
        kept: dict[str, Any] = {
            "models": [m for m in self.models if m in inner],
            "names": {m: names for m, names in self.names.items() if m in inner},
            "caches": {m: names for m, names in self.caches.items() if m in inner},
            "handles": [handle for handle in self.handles if id(handle.hooks_dict_ref()) in dicts],
            "adapters": [m for m in self.adapters if m in inner],
            "model": self.model if id(self.model) in memo else top,
        }
        for name, value in self.__dict__.items():
            if name not in ("calls", "number"):
                twin.__dict__[name] = copy.deepcopy(kept.get(name, value), memo)
        twin.calls, twin.number = _Calls(), next(_numbers)
        twin.memory.attachment = twin
        return twin

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call of a model, and if it is the decoder's, start to fetch its rows. Runs before the model."""
        if module not in self.names:
            raise RuntimeError(
                f"this {type(module).__name__} is a copy of the one that the memory was attached to (DataParallel "
                f"makes such copies): run one process per device"
            )
        passed = dict(zip(self.names[module], args, strict=False)) | kwargs
        arguments = {name: passed[name] for name in _READ if passed.get(name) is not None}
        refuse_recording(next(iter(arguments.values()), None))
        cache = next((passed[name] for name in self.caches[module] if passed.get(name) is not None), None)
        if cache is not None:
            arguments["cache"] = cache
        call = _Call(_calling_frame(), module, arguments)
        self.calls.enter(call)
        if module is self.decoder:
            call.recall = self._recall(call, self._pass())

    def _pass(self) -> list[dict[str, Any]]:
        """Return the arguments of the models in the innermost forward pass, the decoder first, the outermost last."""
        calls = self.calls.all[::-1]
        first = next((i for i, call in enumerate(calls) if i and call.module is self.decoder), len(calls))
        return [call.arguments for call in calls[:first]]

    @property
    def recall(self) -> Recall | None:
        """The rows of the forward pass of the decoder that is under way in this thread."""
        call = self.calls.all[-1] if self.calls.all else None
        return None if call is None or call.module is not self.decoder or not _is_running(call.frame) else call.recall

    def _recall(self, call: _Call, arguments: Sequence[dict[str, Any]]) -> Recall:
        """Recall the rows of a call of the decoder. arguments: of the models in its pass, see _pass."""
        ids, embeds = _innermost(arguments, "input_ids"), call.arguments.get("inputs_embeds")
        if ids is None:
            raise ValueError(
                "the memory is addressed by token ids, and this forward pass has inputs_embeds without input_ids: pass "
                "ids, or detach() the memory"
            )
        ids = ids.reshape(-1, ids.shape[-1])  # as gpt2 does with multiple choice
        batch, time = ids.shape
        if embeds is not None and embeds.shape[:2] != ids.shape:
            raise ValueError(
                f"input_ids are {tuple(ids.shape)}, but the decoder gets {tuple(embeds.shape[:2])} positions: pass the "
                f"ids of the positions that inputs_embeds holds"
            )
        cache = _innermost(arguments, "cache")
        state = MemoryCache() if cache is None else state_of(cache, self.number, time)
        mask = _innermost(arguments[::-1], "attention_mask")  # as the outermost model has it: models convert it
        dead = self._dead(ids, padding(mask, batch, time, state.length))
        position_ids, ends = _innermost(arguments, "position_ids"), _innermost(arguments, "cu_seq_lens_q")
        numbers = documents(position_ids, ends, mask, dead, batch, time, state.length)
        numbers = None if numbers is None else numbers.to(ids.device)
        known = len(self.memory.hasher.token_map.table)
        self.memory.vocab_size = max(known, vocabulary(self.decoder))  # each time: embeddings may have been resized
        disabled = bool(self.adapters) and all(adapter.disable_adapters for adapter in self.adapters)
        with self.memory.off() if disabled else nullcontext():
            recall = self.memory.recall(ids, documents=numbers, cache=state, dead=dead)
        call.cache = cache
        if cache is not None:
            suspend(cache)  # until _leave
        return recall

    def _dead(self, ids: torch.Tensor, dead: torch.Tensor | None) -> torch.Tensor | None:
        """Add the placeholders among the ids to the dead positions [B, T], on the ids' device."""
        for placeholder in self.dead_ids:
            hits = ids == placeholder
            if bool(hits.any()):
                dead = hits if dead is None else dead.to(ids.device) | hits
        return None if dead is None else dead.to(ids.device)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the memory's state into the cache of a call of the decoder. Runs after the model, also if it failed."""
        call = self.calls.leave(module)
        if call is None or call.recall is None or output is None:  # None: the pass failed
            return
        state = call.recall.cache
        assert state is not None
        if call.cache is not None:
            follow(call.cache, state, self.number)
            return
        # A cache that the decoder made itself for this pass: it may come back with the next token.
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        made = next((part for part in parts if isinstance(part, Cache)), None)
        if made is not None and positions(made) == state.length:
            follow(made, state, self.number)

    def _add(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Add the memory's update to the hidden state that a decoder layer is called with. Runs before the layer."""
        recall, memory = self.recall, self.memory
        if recall is None:
            raise RuntimeError(
                f"decoder layer {layer} runs outside a forward pass of its model, so the memory does not know the "
                f"ids. Checkpoint layers by model.gradient_checkpointing_enable() of transformers >= 5.23"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        device = device_of_layer(memory.fusions[str(layer)])  # a model may span several
        hidden = hidden.to(device)
        side_by_side = memory.streams > 1 and hidden.dim() == 3  # [B, T, M*d], as Qwen4-Exp keeps its streams
        streams = hidden.unflatten(-1, (memory.streams, -1)) if side_by_side else hidden
        hidden = hidden + memory[layer](streams, recall).view_as(hidden).to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _innermost(arguments: Sequence[dict[str, Any]], name: str) -> Any:
    """Return the argument of the first call that has it, or None."""
    return next((of_call[name] for of_call in arguments if name in of_call), None)
