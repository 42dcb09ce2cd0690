"""Open model folders of transformers with their memory attached; model_folder.py describes such a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from engram.device import device_of
from engram.integrations.transformers.attach import attach
from engram.integrations.transformers.model_folder import FOLDER, read_config


def from_pretrained(folder: Any, tokenizer: Any = None, **options: Any) -> Any:
    """Open a model folder with its memory, which is attached: what save_pretrained of such a model wrote, or a model
    folder with a saved memory in its sub-folder `engram`.

    Args:
        folder: on this machine. tokenizer: the model's, or its TokenMap, to be checked against the memory's.
        options: of transformers' from_pretrained (dtype, device_map, ...).

    Returns:
        The model, of the class that was saved, in eval mode. engram.detach(model) takes the memory out.

    Raises:
        FileNotFoundError: no model or no memory there. ValueError, OSError: files that cannot be read, or that do not
        belong together; another tokenizer.

    Example:
        >>> import engram, torch, transformers
        >>> shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=48, **shape))
        >>> config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=1000, table_init="normal")
        >>> memory = engram.attach(model, config, engram.TokenMap.identity(64))
        >>> model.save_pretrained("model")  # its rows are among the shards
        >>> opened = engram.from_pretrained("model", engram.TokenMap.identity(64))
        >>> torch.equal(opened.model.engram.tables[1].gather(torch.arange(5)), memory.tables[1].gather(torch.arange(5)))
        True
    """
    home = Path(folder)
    config, architecture = read_config(home)
    if architecture is None and not (home / FOLDER / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{home} holds a model without a memory: open it with transformers, and engram.attach one to it"
        )
    if architecture is None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(home, local_files_only=True, **options)
    else:
        kind = getattr(transformers, architecture)
        ignored = kind._keys_to_ignore_on_load_unexpected
        kind._keys_to_ignore_on_load_unexpected = [*(ignored or ()), rf"(^|\.){FOLDER}\."]  # attach reads them
        try:
            model = kind.from_pretrained(home, config=config, local_files_only=True, **options)
        finally:
            kind._keys_to_ignore_on_load_unexpected = ignored
    attach(model, home, tokenizer)
    return model.eval()


def load_pretrained(
    folder: str | os.PathLike[str],
    memory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model in eval mode and its tokenizer from files alone, with the memory in the folder.

    Args:
        folder: a model folder as save_pretrained writes it, with the tokenizer.
        memory: folder of a saved memory to attach instead; only for a model folder without a memory.
        device: of the dense weights, such as "cpu" or "cuda:1". Default: cuda if there is a card, else the CPU. The
            tables stay in host memory.

    Returns:
        (model, tokenizer), both of transformers.

    Raises:
        FileNotFoundError: the folder holds no model or no tokenizer, or `memory` holds no memory.
        ValueError, OSError: files that transformers cannot read, a memory of another model or tokenizer, or a device
            that this machine does not have.

    Example:
        >>> import engram, tokenizers, transformers
        >>> words = tokenizers.models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]")
        >>> tokenizer = tokenizers.Tokenizer(words)
        >>> tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
        >>> shape = dict(vocab_size=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=48, **shape))
        >>> config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=1000, table_init="normal")
        >>> memory = engram.attach(model, config, tokenizer)
        >>> model.save_pretrained("model")  # the memory among the weights
        >>> files = tokenizer.save_pretrained("model")
        >>> model, tokenizer = engram.load_pretrained("model", device="cpu")
        >>> model(**tokenizer("one two one", return_tensors="pt")).logits.shape
        torch.Size([1, 3, 3])
    """
    home = Path(folder)
    torch_device = device_of(str(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    config, architecture = read_config(home)
    # Without files of a tokenizer, transformers returns an empty one for some models.
    if not any(word in path.name for path in home.iterdir() for word in ("token", "vocab", ".model")):
        raise FileNotFoundError(f"{home} holds no tokenizer: save the model's there with tokenizer.save_pretrained")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home, config=config, local_files_only=True)
    if architecture is not None:
        if memory is not None:
            raise ValueError(f"{home} has a memory of its own, beside which {memory} cannot be attached")
        model: Any = from_pretrained(home, tokenizer)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(home, local_files_only=True)
    model.to(torch_device).eval()
    if memory is not None:
        attach(model, memory, tokenizer)
    return model, tokenizer
