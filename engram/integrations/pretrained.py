"""A model folder of transformers and a memory saved beside it, opened together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from engram.integrations.attach import attach


def load_pretrained(folder: Path, memory: Path | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer, both from files alone.

    Args:
        folder: as save_pretrained writes it, with the tokenizer. memory: what memory.save wrote; it is attached.

    Raises:
        FileNotFoundError: no model there, or no memory. ValueError, OSError: files that transformers cannot read; a
        memory for another model or tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no model folder of transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if memory is not None:
        attach(model, memory, tokenizer)
    return model, tokenizer
