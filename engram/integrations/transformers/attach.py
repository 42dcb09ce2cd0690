"""attach: a memory for a decoder model of transformers that exists already, without a line of its code changed.

    memory = engram.attach(model, config, tokenizer)   # the model now looks n-grams up
    memory.detach()                                    # the model as it was

Two kinds of hooks do it. One sits on the decoder and on the models around it: it sees the input ids of a forward pass
and sends for their rows. The other sits on each decoder layer that owns a table, and adds what the memory says to the
hidden state before the layer runs. Gradient checkpointing recomputes a layer's forward(), not its hooks, so nothing is
recalled twice.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import sys
import threading
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from engram.addressing import TokenMap
from engram.config import EngramConfig
from engram.integrations.transformers.decoding import CACHE_NAMES, cache_argument, follow, positions, state_of, suspend
from engram.integrations.transformers.inputs import documents, padding, placeholder_ids, vocabulary
from engram.integrations.transformers.model_folder import SavePretrained, open_memory
from engram.memory import EngramMemory
from engram.memory.recall import MemoryCache, Recall, refuse_recording, uncompiled

_LAYERS = ("layers", "h", "blocks")  # what decoders call their list of layers
_STREAMS = ("hc_mult", "hc_count")  # what configurations call the number of residual streams
_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cu_seq_lens_q")
_numbers = itertools.count(1)


def attach(
    model: nn.Module,
    memory: EngramConfig | EngramMemory | str | os.PathLike[str],
    tokenizer: Any = None,
) -> EngramMemory:
    """Gives a decoder model of transformers an n-gram memory, and returns it. It becomes the submodule `engram` of the
    decoder: parameters(), to(), train() and state_dict() of the model include it.

    With rows of zeros, which is the default, logits are at first exactly what they were. Train rows and weights with
    engram.build_optimizer(model), in a loop of your own or as transformers.Trainer(optimizers=(optimizer, None)).
    Padding (attention_mask 0) and the placeholders of images and the like are not text: they are never hashed, end the
    n-grams around them and get nothing from the memory. Position ids that start again begin a new document, and so do
    cu_seq_lens_q and the blocks of a finished attention mask. Several threads may run one model.
    Keep it with memory.save, or with the model: save_pretrained writes the memory among the model's weights,
    engram.from_pretrained opens such a folder, and transformers alone refuses it. Checkpoints of PEFT hold its adapters
    alone: give the Trainer an engram.MemoryCallback(), which keeps the memory beside them. copy.deepcopy(model) has a
    memory of its own. Training in several processes is not supported yet.

    Args:
        model: a decoder model, or one wrapped by PEFT or torch.compile. Attach after PEFT, which freezes all weights it
            finds; on a model spread by device_map, after loading.
        memory: configuration of a new memory, an EngramMemory, or a folder that holds one: of memory.save, of
            save_pretrained of a model with a memory, or a checkpoint of PEFT with a memory in it.
        tokenizer: of the model, or its TokenMap. Needed for a configuration, else checked against the memory's: it may
            have gained tokens since. Those are dead, as are the embeddings that no token names: never hashed, they end
            n-grams and get nothing from the memory, unless their text has a class already (TokenMap.extend).

    Raises:
        ValueError: a model without decoder layers as this looks for them, one that keeps its decoding state elsewhere
        than in a Cache that counts positions (Mamba, RWKV, xLSTM), one whose layers pass on other
        streams than the memory can add to (Gemma 3n), or one with a memory already; a configuration or memory of
        another shape; another tokenizer than the memory's. Forward passes raise it where they give
        inputs_embeds without ids, a cache that the memory has not followed or cannot follow, or a mask of a tree of
        drafts.
        FileNotFoundError: no memory in that folder.
    """
    root = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if root is None:
        raise ValueError(f"{type(model).__name__} holds no PreTrainedModel of transformers")
    if any(isinstance(m, EngramMemory) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has a memory already: go on with that one, or call engram.detach(model) and "
            f"attach again, also where a cell of a notebook runs twice"
        )
    decoder, layers = find_layers(root)
    if hasattr(decoder, "engram"):
        raise ValueError(f"{type(decoder).__name__} has an attribute `engram` of its own")
    token_map = (
        tokenizer if tokenizer is None or isinstance(tokenizer, TokenMap) else TokenMap.from_tokenizer(tokenizer)
    )
    _check_cache(decoder)
    size = decoder.config.hidden_size
    streams = next((n for name in _STREAMS if (n := getattr(decoder.config, name, None))), 1)
    _check_hidden_states(decoder, layers, streams, size, _device(root.get_input_embeddings()))
    if isinstance(memory, EngramConfig):
        if token_map is None:
            raise ValueError("a new memory needs the model's tokenizer, or its TokenMap: its rows are addressed by it")
        memory = EngramMemory(memory, token_map, size, streams)
    elif not isinstance(memory, EngramMemory):
        memory = open_memory(memory, token_map)
    if token_map is not None:
        memory.extend(token_map)  # raises if it belongs to another tokenizer
    if memory.attachment is not None:
        raise ValueError("this memory is attached to a model already: call memory.detach(), then attach it again")
    if memory.config.layers[-1] >= len(layers):
        raise ValueError(f"the memory wants layers {memory.config.layers}, the model has 0 .. {len(layers) - 1}")
    if memory.config.inject != "residual":
        raise ValueError(
            f"attach() adds to the residual stream; inject={memory.config.inject!r} needs a model that knows it"
        )
    if (memory.streams, memory.hidden_size) != (streams, size):
        raise ValueError(
            f"the memory is for {memory.streams} streams x {memory.hidden_size}, the model has {streams} streams x "
            f"{size}"
        )
    dtype = next(root.get_input_embeddings().parameters()).dtype
    for layer in memory.config.layers:
        memory.fusions[str(layer)].to(_device(layers[layer]), dtype)
    memory.train(decoder.training)
    memory.attachment = Attachment(model, root, decoder, layers, memory)
    decoder.engram = memory
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled before knows no hooks, and would run on without the memory
    return memory


def detach(model: nn.Module) -> EngramMemory:
    """Takes the memory out of a model that `attach` gave one, and returns it. The model is then as it was.

    Raises:
        ValueError: a model without an attached memory.
    """
    memory = next((m for m in model.modules() if isinstance(m, EngramMemory) and m.attachment is not None), None)
    if memory is None:
        raise ValueError(f"{type(model).__name__} has no attached memory")
    memory.detach()
    return memory


def find_layers(root: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The decoder of a model and its list of layers.

    Raises:
        ValueError: an encoder-decoder model, or none or several lists of the expected names and length.
    """
    decoder = root.get_decoder()
    found = _lists(decoder) or [pair for module in root.modules() for pair in _lists(module)]
    if root.config.is_encoder_decoder or len(found) != 1:
        children = ", ".join(f"{name} ({type(m).__name__})" for name, m in decoder.named_children())
        raise ValueError(
            f"attach() does not know the architecture of {type(root).__name__}: it looks for a decoder-only model "
            f"whose decoder has one ModuleList named {', '.join(_LAYERS)} with config.num_hidden_layers layers, and "
            f"found {len(found)}. {type(decoder).__name__} has: {children}"
        )
    return found[0]


def _check_cache(decoder: PreTrainedModel) -> None:
    """Refuse a decoder whose decoding state the memory cannot follow."""
    taken = inspect.signature(decoder.forward).parameters
    name = type(decoder).__name__
    if "use_cache" in taken and cache_argument(decoder) is None:
        raise ValueError(
            f"{name} keeps what it has decoded elsewhere than in a Cache of transformers (it takes "
            f"{', '.join(taken)}), where the memory cannot follow it: cached decoding would read the wrong rows"
        )
    try:
        positions(DynamicCache(config=decoder.config))
    except ValueError as error:
        raise ValueError(
            f"{name} keeps what it has decoded elsewhere than in keys and values: its cache has recurrent states only "
            f"and does not count positions, so the memory cannot follow it ({error})"
        ) from error


class _Reached(BaseException):
    """The first layer was called: raised to end a forward pass there."""


def _check_hidden_states(
    decoder: PreTrainedModel, layers: nn.ModuleList, streams: int, size: int, device: torch.device
) -> None:
    """Refuse a decoder whose layers pass something else on than a residual stream [B, T, d] or several [B, T, M, d].

    Runs the decoder on two ids up to its first layer. A decoder that needs more than ids to get there is not refused.
    """
    calls: list[tuple[Any, ...]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((*args[:1], kwargs.get("hidden_states")))
        raise _Reached

    handle = layers[0].register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        ids = torch.ones(1, 2, dtype=torch.int64, device=device)
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            decoder.forward(input_ids=ids)
    except (_Reached, Exception):
        pass
    finally:
        handle.remove()
    if not calls:
        return
    shape = tuple(calls[0][0].shape) if isinstance(calls[0][0], torch.Tensor) else None
    if shape not in {(1, 2, streams * size), (1, 2, streams, size)}:
        raise ValueError(
            f"the layers of {type(decoder).__name__} pass hidden states {list(shape or ())} on for ids [1, 2], where "
            f"[batch, time, {streams * size}] was expected: the memory can add to one residual stream, or to several "
            f"side by side, but not to streams of another axis (AltUp) or width"
        )


def _lists(module: nn.Module) -> list[tuple[PreTrainedModel, nn.ModuleList]]:
    """Lists of as many layers as the module's configuration says, directly in it."""
    if not isinstance(module, PreTrainedModel):
        return []
    lists = [m for name, m in module.named_children() if name in _LAYERS and isinstance(m, nn.ModuleList)]
    return [(module, m) for m in lists if len(m) == getattr(module.config, "num_hidden_layers", None)]


def _device(layer: nn.Module) -> torch.device:
    """Where a layer computes: accelerate says so for layers whose weights it keeps elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    stated = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    return next(layer.parameters()).device if stated is None else torch.device(stated)


@dataclass
class _Call:
    """A call of the decoder or of a model around it.

    Attributes:
        frame: of torch, which runs until the call ends. given: what the model was given of _READ, and its cache as
        "cache", whatever the model calls that argument. recall, cache: of a call of the decoder, its rows and where
        its keys and values go, if that was given.
    """

    frame: FrameType
    module: nn.Module
    given: dict[str, Any]
    recall: Recall | None = None
    cache: Cache | None = None


class _Calls(threading.local):
    """The calls that are under way in this thread, the outermost first: others may run the same model meanwhile.

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
        self.number = next(_numbers)  # caches remember whose state they hold, also as copies
        self.calls = _Calls()
        self.dead_ids = placeholder_ids(root.config)
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
        """The attachment of a copy of its models, which is under way; itself where only parts of them are copied."""
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
            "model": self.model if id(self.model) in memo else top,
        }
        for name, value in self.__dict__.items():
            if name not in ("calls", "number"):
                twin.__dict__[name] = copy.deepcopy(kept.get(name, value), memo)
        twin.calls, twin.number = _Calls(), next(_numbers)
        twin.memory.attachment = twin
        return twin

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self.names:
            raise RuntimeError(
                f"this {type(module).__name__} is a copy of the one that the memory was attached to (DataParallel "
                f"makes such): run one process per device"
            )
        given = dict(zip(self.names[module], args, strict=False)) | kwargs
        read = {name: given[name] for name in _READ if given.get(name) is not None}
        refuse_recording(next(iter(read.values()), None))
        cache = next((given[name] for name in self.caches[module] if given.get(name) is not None), None)
        if cache is not None:
            read["cache"] = cache
        call = _Call(_calling_frame(), module, read)
        self.calls.enter(call)
        if module is self.decoder:
            call.recall = self._recall(call, self._pass())

    def _pass(self) -> list[dict[str, Any]]:
        """What the models of the innermost forward pass were given, the decoder first and the outermost last."""
        calls = self.calls.all[::-1]
        first = next((i for i, call in enumerate(calls) if i and call.module is self.decoder), len(calls))
        return [call.given for call in calls[:first]]

    @property
    def recall(self) -> Recall | None:
        """The rows of the forward pass of the decoder that is under way in this thread."""
        call = self.calls.all[-1] if self.calls.all else None
        return None if call is None or call.module is not self.decoder or not _is_running(call.frame) else call.recall

    def _recall(self, call: _Call, given: list[dict[str, Any]]) -> Recall:
        def innermost(name: str) -> Any:
            return next((g[name] for g in given if name in g), None)

        ids, embeds = innermost("input_ids"), call.given.get("inputs_embeds")
        if ids is None:
            raise ValueError(
                "the memory is addressed by token ids, and this forward pass has inputs_embeds without input_ids: pass "
                "ids, or detach() the memory"
            )
        ids = ids.reshape(-1, ids.shape[-1])  # as gpt2 does with multiple choice
        batch, time = ids.shape
        if embeds is not None and embeds.shape[:2] != ids.shape:
            raise ValueError(
                f"input_ids are {tuple(ids.shape)}, but the decoder gets {tuple(embeds.shape[:2])} positions"
            )
        cache = innermost("cache")
        state = MemoryCache() if cache is None else state_of(cache, self.number, time)
        masks = (g["attention_mask"] for g in reversed(given) if "attention_mask" in g)
        mask = next(masks, None)  # as the outermost model has it: models convert it
        dead = padding(mask, batch, time, state.length)
        for placeholder in self.dead_ids:
            found = ids == placeholder
            if bool(found.any()):
                dead = found if dead is None else dead.to(ids.device) | found
        dead = None if dead is None else dead.to(ids.device)
        places, ends = innermost("position_ids"), innermost("cu_seq_lens_q")
        runs = documents(places, ends, mask, dead, batch, time, state.length)
        runs = None if runs is None else runs.to(ids.device)
        known = len(self.memory.hasher.token_map.table)
        self.memory.vocab_size = max(known, vocabulary(self.decoder))  # each time: embeddings may have been resized
        recall = self.memory.recall(ids, documents=runs, cache=state, dead=dead)
        call.cache = cache
        if cache is not None:
            suspend(cache)  # until _leave
        return recall

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
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
        """Before a decoder layer: its hidden state and what the memory adds."""
        recall, memory = self.recall, self.memory
        if recall is None:
            raise RuntimeError(
                f"decoder layer {layer} runs outside a forward pass of its model, so the memory does not know the "
                f"ids. Checkpoint layers by model.gradient_checkpointing_enable() of transformers >= 5.23"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        device = _device(memory.fusions[str(layer)])  # a model may span several
        hidden = hidden.to(device)
        side_by_side = memory.streams > 1 and hidden.dim() == 3  # [B, T, M*d], as Qwen4-Exp keeps its streams
        streams = hidden.unflatten(-1, (memory.streams, -1)) if side_by_side else hidden
        hidden = hidden + memory[layer](streams, recall).view_as(hidden).to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
