"""MemoryCallback: save the memory of a PEFT model in each checkpoint of transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from engram.integrations.transformers.model_folder import FOLDER
from engram.memory import EngramMemory


class MemoryCallback(transformers.TrainerCallback):
    """Save the memory in the folder `engram` of each checkpoint that holds only adapters of PEFT. Read it back when
    training resumes and when load_best_model_at_end loads the best checkpoint. Checkpoints of other models hold the
    memory among their weights, and are not changed.

        Trainer(model, arguments, optimizers=(build_optimizer(model), None), callbacks=[engram.MemoryCallback()])

    Args:
        resumed_from: the checkpoint passed to train(resume_from_checkpoint=...), if it is not in output_dir.

    Raises:
        FileNotFoundError: a checkpoint that was saved without this callback. ValueError: a memory of another shape.
    """

    def __init__(self, resumed_from: str | os.PathLike[str] | None = None):
        self.resumed_from = resumed_from

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        checkpoint = _checkpoint(args, state)
        if state.is_world_process_zero and _holds_adapters(checkpoint):
            for memory in _memories(model):
                memory.save(checkpoint / FOLDER, overwrite=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if state.global_step:  # training resumes from a checkpoint of this step
            path = self.resumed_from or args.resume_from_checkpoint
            _restore(model, _checkpoint(args, state) if path is None or path is True else Path(path))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _restore(model, Path(state.best_model_checkpoint))


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _holds_adapters(checkpoint: Path) -> bool:
    return any(checkpoint.glob("adapter_config.json")) or any(checkpoint.glob("*/adapter_config.json"))


def _memories(model: nn.Module) -> list[EngramMemory]:
    memories = [module for module in model.modules() if isinstance(module, EngramMemory)]
    if len(memories) > 1:
        raise ValueError(f"{type(model).__name__} has {len(memories)} memories, but MemoryCallback saves only one")
    return memories


def _restore(model: nn.Module, checkpoint: Path) -> None:
    """Read a memory back from a checkpoint that holds it in a folder of its own.

    Raises:
        FileNotFoundError: a checkpoint without the memory. ValueError: a memory of another shape.
    """
    folder = checkpoint / FOLDER
    for memory in _memories(model):
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{checkpoint} does not exist: if training resumes from another folder, name it with "
                f"MemoryCallback(resumed_from=...)"
            )
        if not _holds_adapters(checkpoint):
            continue
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(
                f"{checkpoint} holds adapters of PEFT without their memory: it was saved without MemoryCallback. Start "
                f"again, or copy the folder that memory.save wrote to {folder}"
            )
        saved = EngramMemory.load(folder, mode="shared", token_map=memory.hasher.token_map)
        try:
            memory.load_state_dict(saved.state_dict())
        except RuntimeError as error:  # torch's own wording for shapes
            raise ValueError(f"the memory in {folder} does not fit the model's: {error}") from error
        finally:
            saved.close()
