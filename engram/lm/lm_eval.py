"""Run tasks of lm-eval (EleutherAI's harness) on our models: log-likelihoods, perplexities and generated answers.

Models of transformers go through lm-eval's own adapter, with or without an attached memory. The Transformer of this
library has its adapter here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from engram.lm.generate import generate
from engram.lm.tokenizer import END_OF_TEXT_ID
from engram.lm.transformer import Transformer


class TransformerLM(TemplateLM):
    """Adapter of a Transformer for lm-eval. Every text begins with <|endoftext|>, as the documents of training do.

    Sequences of one batch are padded on the right, behind everything that is scored, and prompts to continue are
    batched with others of their length, so no n-gram, convolution or attention ever reads padding.

    Args:
        model: with or without memory. tokenizer: made by engram.lm.tokenizer. batch_tokens: padding included.
    """

    def __init__(self, model: Transformer, tokenizer: tokenizers.Tokenizer, batch_tokens: int = 2048):
        super().__init__()
        self.model, self.bpe, self.batch_tokens = model.eval(), tokenizer, batch_tokens
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return END_OF_TEXT_ID

    @property
    def max_length(self) -> int:
        return self.model.config.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.bpe.encode(string, add_special_tokens=False).ids
        return ids if add_special_tokens is False else [END_OF_TEXT_ID, *ids]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the summed nats (negative) of each text, in windows of lm-eval: each token is predicted once."""
        windows: list[Any] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, END_OF_TEXT_ID, self.max_length, context_len=1):
                windows.append((request.args, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return (summed log-likelihood of the continuation, whether it is the likeliest) per request.

        A request is (text, context ids, continuation ids).
        """
        for text, _context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"{text[-1][:80]!r} adds {len(continuation)} tokens to its context, but this model scores 1 to "
                    f"{self.max_length} tokens. If it adds 0, it merges with the context: begin it with a space"
                )
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        windows = [(c + x)[-(self.max_length + 1) :] for _text, c, x in requests]
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))  # batch similar lengths: little padding
        while order:
            longest = len(windows[order[0]])
            size = max(1, self.batch_tokens // longest)
            batch, order = order[:size], order[size:]
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, i in enumerate(batch):
                ids[row, : len(windows[i])] = torch.tensor(windows[i])
            logits = self.model(ids[:, :-1].to(self._device)).float()
            for row, i in enumerate(batch):
                stop = len(windows[i]) - 1
                scores[i] = _score(logits[row, :stop], ids[row, 1 : stop + 1], len(requests[i][2]))
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the likeliest continuation of each prompt, cut before the first of its stop strings."""
        answers = [""] * len(requests)
        groups: dict[tuple[int, int], list[tuple[int, list[int], list[str]]]] = {}
        for i, request in enumerate(requests):
            prompt, generation_kwargs = request.args
            options = normalize_gen_kwargs(generation_kwargs, default_max_gen_toks=min(256, self.max_length // 2))
            until, tokens = options.pop("until"), options.pop("max_gen_toks")
            if options.pop("do_sample") or options.pop("temperature", 0.0) or options:
                raise ValueError(
                    f"generation_kwargs {generation_kwargs} are not supported: this adapter generates greedily, so set "
                    f"only until and max_gen_toks"
                )
            if tokens >= self.max_length:
                raise ValueError(
                    f"the task generates {tokens} new tokens, but prompt and answer must fit in the model's max_length "
                    f"{self.max_length}: lower the task's generation_kwargs.max_gen_toks"
                )
            ids = self.tok_encode(prompt)[-(self.max_length - tokens) :]
            groups.setdefault((len(ids), tokens), []).append((i, ids, handle_stop_sequences(until, None)))
        for (length, tokens), members in groups.items():
            size = max(1, self.batch_tokens // (length + tokens))
            for lo in range(0, len(members), size):
                batch = members[lo : lo + size]
                prompts = torch.tensor([ids for _, ids, _ in batch], device=self._device)
                out = generate(self.model, prompts, tokens, temperature=0, stop_id=END_OF_TEXT_ID)
                for (i, _, until), row in zip(batch, out[:, length:].tolist(), strict=True):
                    text = self.bpe.decode([*row, END_OF_TEXT_ID][: [*row, END_OF_TEXT_ID].index(END_OF_TEXT_ID)])
                    answers[i] = postprocess_generated_text(text, until, None)
        return answers


def _score(logits: Tensor, targets: Tensor, count: int) -> tuple[float, bool]:
    """Return the summed log-probability of the last `count` of targets [T], and whether all are the likeliest.

    Logits are [T, vocab].
    """
    logits, targets = logits[-count:], targets[-count:].to(logits.device)
    return -F.cross_entropy(logits, targets, reduction="sum").item(), bool((logits.argmax(-1) == targets).all())


def adapter(model: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """Return the lm-eval model of a Transformer, or of a model of transformers (with its memory if one is attached)."""
    if isinstance(model, Transformer):
        return TransformerLM(model, tokenizer)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def load_tasks(names: list[str], task_files: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Load lm-eval's task objects, with their data.

    Args:
        names: tasks, groups or tags. task_files: folder with the tasks' YAML files; names of data files in them are
            relative to it. None takes lm-eval's own tasks, whose data comes from the Hugging Face hub.

    Raises:
        FileNotFoundError: the folder or a data file does not exist. ValueError: a task is unknown, lm-eval cannot read
        a task file, or the hub that has the data cannot be reached.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if task_files is None else Path(task_files).resolve()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"{task_files} is not a folder of task files: give an existing folder with the tasks' YAML files"
        )
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name, folder, manager))
    task_objects: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _inside(folder):
        for name in names:
            try:
                loaded = manager.load(name)
            except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
                raise ValueError(
                    f"the data of task {name!r} is on the Hugging Face hub, which cannot be reached or does not have "
                    f"it ({_line(error)}): name local files in the task's dataset_kwargs.data_files instead"
                ) from error
            except FileNotFoundError as error:
                raise FileNotFoundError(f"task {name!r}: {_line(error)}") from error
            except Exception as error:  # lm-eval raises errors of many types for a bad task file
                problem = f"{type(error).__name__}: {_line(error)}"
                raise ValueError(f"lm-eval cannot load task {name!r}: {problem}") from error
            for kind in task_objects:
                task_objects[kind].update(loaded.get(kind) or {})
    for task in task_objects["tasks"].values():  # what lm-eval's own command sets where a task file does not
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return task_objects


def run_tasks(lm: Any, tasks: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Score a model on lm-eval tasks.

    Args:
        lm: what `adapter` returns.
        tasks: what `load_tasks` returns.
        limit: documents per task; None takes all.

    Returns:
        {"lm_eval": its version, "results": one dict per task and metric, with task, metric, value, stderr (None if
        lm-eval has none) and documents}.

    Raises:
        ValueError: the model cannot score a continuation, or a task sets generation options that are not supported.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork this process for a second of work
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints to stdout
        scores = evaluate(lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
    results = []
    for task, figures in scores["results"].items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            results.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else key,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "documents": scores["n-samples"].get(task, {}).get("effective"),
                }
            )
    return {"lm_eval": version("lm_eval"), "results": results}


def _unknown(name: str, folder: Path | None, manager: TaskManager) -> str:
    if folder is None:
        return f"lm-eval has no task {name!r}, and --task-files is not set: `lm-eval ls tasks` lists its tasks"
    read = {entry.yaml_path for entry in manager.task_index.values()}
    unread = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.yaml")) if p not in read]
    known = ", ".join(manager.all_tasks) or "none"
    problem = f"; lm-eval could not read {', '.join(unread)}" if unread else ""
    return f"no task {name!r} in the YAML files of {folder}; known tasks: {known}{problem}"


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Change to that folder, so that names of data files are relative to the task files and not to the caller."""
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def _line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
