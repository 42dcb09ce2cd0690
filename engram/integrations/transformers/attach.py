"""attach: a memory for an existing decoder model of transformers, without a change of the model's code.

    memory = engram.attach(model, config, tokenizer)   # forward passes now look n-grams up
    memory.detach()                                    # restore the model

The hooks that do the work are in hooks.py; architecture.py finds the decoder and its layers.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engram.addressing import TokenMap
from engram.config import EngramConfig
from engram.integrations.transformers.architecture import check_decoder, device_of_layer, find_layers, stream_count
from engram.integrations.transformers.hooks import Attachment
from engram.integrations.transformers.model_folder import open_memory
from engram.memory import EngramMemory


def attach(
    model: nn.Module,
    memory: EngramConfig | EngramMemory | str | os.PathLike[str],
    tokenizer: Any = None,
) -> EngramMemory:
    """Attach an n-gram memory to a decoder model of transformers, and return the memory. It becomes the submodule
    `engram` of the decoder: parameters(), to(), train() and state_dict() of the model include it.

    Rows are zeros by default, and then logits are at first exactly what they were. Train rows and weights with
    engram.build_optimizer(model), in a loop of your own or as transformers.Trainer(optimizers=(optimizer, None)).
    Padding (attention_mask 0) and the placeholders of images and the like are not text: they are never hashed, end the
    n-grams around them and get nothing from the memory. Position ids that start again begin a new document, and so do
    cu_seq_lens_q and the blocks of a finished attention mask. Several threads may run one model.
    Keep it with memory.save, or with the model: save_pretrained writes the memory among the model's weights,
    engram.from_pretrained opens such a folder, and transformers alone refuses it. Checkpoints of PEFT hold its adapters
    alone: give the Trainer an engram.MemoryCallback(), which keeps the memory beside them. copy.deepcopy(model) has a
    memory of its own. Training in several processes is not supported yet.

    Args:
        model: a decoder model, or one wrapped by PEFT or torch.compile. Attach after PEFT, which freezes all weights
            that the model has by then; on a model spread by device_map, after loading.
        memory: configuration of a new memory, an EngramMemory, or a folder with one: of memory.save, of
            save_pretrained of a model with a memory, or a checkpoint of PEFT with a memory in it.
        tokenizer: the model's, or its TokenMap. Needed for a configuration, else checked against the memory's: it may
            have gained tokens since. Those are dead, as are the embeddings that no token names: never hashed, they end
            n-grams and get nothing from the memory, unless their text has a class already (TokenMap.extend).

    Returns:
        The EngramMemory, now part of the model, in the model's mode (train or eval).

    Raises:
        ValueError: a model without decoder layers that attach() recognises, one that keeps its decoding state elsewhere
        than in a Cache that counts positions (Mamba, RWKV, xLSTM), one whose layers pass on other
        streams than the memory can add to (Gemma 3n), or one with a memory already; a configuration or memory of
        another shape; another tokenizer than the memory's. Later forward passes raise it for inputs_embeds without
        ids, for a cache that the memory has not followed or cannot follow, and for a mask of a tree of drafts.
        FileNotFoundError: no memory in that folder.

    Example:
        >>> import engram, torch, transformers
        >>> shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=48, **shape))
        >>> config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=1000)
        >>> memory = engram.attach(model, config, engram.TokenMap.identity(64))  # or the model's tokenizer
        >>> ids = torch.randint(0, 64, (2, 16))
        >>> optimizer = engram.build_optimizer(model, lr=1e-4, table_lr=0.03)  # weights and table rows together
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
        >>> memory.save("adapter")  # engram.attach(model, "adapter", tokenizer) opens it again
        PosixPath('adapter')
        >>> sorted(name for name, _ in model.model.named_children())
        ['embed_tokens', 'engram', 'layers', 'norm', 'rotary_emb']
    """
    root = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if root is None:
        raise ValueError(
            f"{type(model).__name__} holds no PreTrainedModel of transformers: attach() takes a decoder model of "
            f"transformers, or one wrapped by PEFT or torch.compile"
        )
    if any(isinstance(m, EngramMemory) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has a memory already: continue with it, or call engram.detach(model) and "
            f"attach again, also if a cell of a notebook runs twice"
        )
    decoder, layers = find_layers(root)
    token_map = (
        tokenizer if tokenizer is None or isinstance(tokenizer, TokenMap) else TokenMap.from_tokenizer(tokenizer)
    )
    check_decoder(root, decoder, layers)
    memory = _memory(memory, token_map, decoder.config.hidden_size, stream_count(decoder))
    _check_memory(memory, decoder, len(layers))
    dtype = next(root.get_input_embeddings().parameters()).dtype
    for layer in memory.config.layers:
        memory.fusions[str(layer)].to(device_of_layer(layers[layer]), dtype)
    memory.train(decoder.training)
    memory.attachment = Attachment(model, root, decoder, layers, memory)
    decoder.engram = memory
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code compiled before has no hooks, and would run on without the memory
    return memory


def _memory(
    memory: EngramConfig | EngramMemory | str | os.PathLike[str], token_map: TokenMap | None, size: int, streams: int
) -> EngramMemory:
    """Return the memory to attach: a new one of a configuration, the one in a folder, or the one passed."""
    if isinstance(memory, EngramConfig):
        if token_map is None:
            raise ValueError("a new memory needs the model's tokenizer, or its TokenMap: its rows are addressed by it")
        memory = EngramMemory(memory, token_map, size, streams)
    elif not isinstance(memory, EngramMemory):
        memory = open_memory(memory, token_map)
    if token_map is not None:
        memory.extend(token_map)  # raises if it belongs to another tokenizer
    return memory


def _check_memory(memory: EngramMemory, decoder: PreTrainedModel, layers: int) -> None:
    """Raise ValueError if a memory is attached already, or does not fit a decoder of so many layers."""
    size, streams = decoder.config.hidden_size, stream_count(decoder)
    if memory.attachment is not None:
        raise ValueError("this memory is attached to a model already: call memory.detach(), then attach it again")
    if memory.config.layers[-1] >= layers:
        raise ValueError(f"memory layers {memory.config.layers} are out of range: the model has layers 0..{layers - 1}")
    if memory.config.inject != "residual":
        raise ValueError(
            f"attach() adds to the residual stream, but the memory has inject={memory.config.inject!r}: give a memory "
            f"with inject='residual'"
        )
    if (memory.streams, memory.hidden_size) != (streams, size):
        raise ValueError(
            f"the memory is for {memory.streams} streams x {memory.hidden_size}, the model has {streams} streams x "
            f"{size}: build the memory for the model's shape, or attach its EngramConfig"
        )


def detach(model: nn.Module) -> EngramMemory:
    """Take the memory out of a model that `attach` gave one, and return it. The model is then as it was.

    Args:
        model: the model that was given to `attach`, or one that contains it.

    Returns:
        The EngramMemory, which can be attached again or saved.

    Raises:
        ValueError: a model without an attached memory.

    Example:
        >>> import engram, transformers
        >>> shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=48, **shape))
        >>> config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=1000)
        >>> memory = engram.attach(model, config, engram.TokenMap.identity(64))
        >>> engram.detach(model) is memory
        True
        >>> any("engram" in name for name, _ in model.named_modules())
        False
    """
    memory = next((m for m in model.modules() if isinstance(m, EngramMemory) and m.attachment is not None), None)
    if memory is None:
        raise ValueError(f"{type(model).__name__} has no attached memory")
    memory.detach()
    return memory
