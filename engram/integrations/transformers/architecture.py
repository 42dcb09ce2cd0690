"""What the modules of a transformers model are: its decoder, the decoder's layers, their streams and devices.

A model that a memory could not serve correctly is refused here, before anything is attached.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from engram.integrations.transformers.decoding import cache_argument, positions

_LAYERS = ("layers", "h", "blocks")  # what decoders call their list of layers
_STREAMS = ("hc_mult", "hc_count")  # what configurations call the number of residual streams


def find_layers(root: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """Return the decoder of a model and its list of layers.

    Raises:
        ValueError: an encoder-decoder model, or none or several lists of the expected names and length.
    """
    decoder = root.get_decoder()
    pairs = _lists(decoder) or [pair for module in root.modules() for pair in _lists(module)]
    if root.config.is_encoder_decoder or len(pairs) != 1:
        children = ", ".join(f"{name} ({type(m).__name__})" for name, m in decoder.named_children())
        raise ValueError(
            f"attach() does not know the architecture of {type(root).__name__}: it looks for a decoder-only model "
            f"whose decoder has one ModuleList named {', '.join(_LAYERS)} with config.num_hidden_layers layers, and "
            f"found {len(pairs)}. {type(decoder).__name__} has: {children}"
        )
    return pairs[0]


def _lists(module: nn.Module) -> list[tuple[PreTrainedModel, nn.ModuleList]]:
    """List the ModuleLists directly in a module that have as many layers as its configuration names."""
    if not isinstance(module, PreTrainedModel):
        return []
    lists = [m for name, m in module.named_children() if name in _LAYERS and isinstance(m, nn.ModuleList)]
    return [(module, m) for m in lists if len(m) == getattr(module.config, "num_hidden_layers", None)]


def stream_count(decoder: PreTrainedModel) -> int:
    """Return the number of residual streams of a decoder, 1 for most."""
    return next((n for name in _STREAMS if (n := getattr(decoder.config, name, None))), 1)


def device_of_layer(layer: nn.Module) -> torch.device:
    """Return the device on which a layer computes; accelerate may keep the layer's weights on another one."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    of_hook = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    return next(layer.parameters()).device if of_hook is None else torch.device(of_hook)


def check_decoder(root: PreTrainedModel, decoder: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Refuse a decoder that a memory cannot follow or cannot add to.

    Raises:
        ValueError: the decoder has an attribute `engram` of its own, keeps its decoding state elsewhere than in a Cache
            that counts positions, or its layers pass on other streams than the memory can add to.
    """
    if hasattr(decoder, "engram"):
        raise ValueError(
            f"{type(decoder).__name__} has an attribute `engram` of its own, the name under which attach() adds the "
            f"memory: rename it in the model"
        )
    _check_cache(decoder)
    _check_hidden_states(decoder, layers, device_of_layer(root.get_input_embeddings()))


def _check_cache(decoder: PreTrainedModel) -> None:
    """Refuse a decoder whose decoding state the memory cannot follow."""
    parameters = inspect.signature(decoder.forward).parameters
    name = type(decoder).__name__
    if "use_cache" in parameters and cache_argument(decoder) is None:
        raise ValueError(
            f"{name} keeps what it has decoded elsewhere than in a Cache of transformers (it takes "
            f"{', '.join(parameters)}), where the memory cannot follow it: cached decoding would read the wrong rows"
        )
    try:
        positions(DynamicCache(config=decoder.config))
    except ValueError as error:
        raise ValueError(
            f"{name} keeps what it has decoded elsewhere than in keys and values: its cache has recurrent states only "
            f"and does not count positions, so the memory cannot follow it ({error})"
        ) from error


class _Reached(BaseException):
    """Raised by a hook to end a forward pass as soon as the first layer is called."""


def _check_hidden_states(decoder: PreTrainedModel, layers: nn.ModuleList, device: torch.device) -> None:
    """Refuse a decoder whose layers pass on something else than a residual stream [B, T, d] or several [B, T, M, d].

    Run the decoder on two ids up to its first layer. A decoder that needs more than ids to get that far is accepted.
    """
    streams, size = stream_count(decoder), decoder.config.hidden_size
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
