"""Open model folders of transformers with their memory attached; model_folder.py says what lies in such a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

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


def load_pretrained(folder: Path, memory: Path | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer, both from files alone, with the memory in the folder.

    Args:
        folder: as save_pretrained writes it, with the tokenizer. memory: a saved memory to attach instead.

    Raises:
        FileNotFoundError: no model there, or no memory. ValueError, OSError: files that transformers cannot read; a
        memory for another model or tokenizer.
    """
    config, architecture = read_config(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    if architecture is not None:
        if memory is not None:
            raise ValueError(f"{folder} has a memory of its own, beside which {memory} cannot be attached")
        model: Any = from_pretrained(folder, tokenizer)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if memory is not None:
        attach(model, memory, tokenizer)
    return model, tokenizer
