"""lm-eval tasks on local files: own models and transformers models get the same log-likelihoods as a plain loop."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[lm-eval]' in the project's folder")

import datasets
import huggingface_hub
import transformers as hf
from hf_models import build
from lm_eval.api.instance import Instance

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig
from engram.cli import main
from engram.integrations.transformers.pretrained import load_pretrained
from engram.lm.corpus import Document
from engram.lm.evaluate import evaluate
from engram.lm.lm_eval import adapter, load_tasks, run_tasks
from engram.lm.tokenizer import encode, train_tokenizer

FULL = EngramConfig(
    layers=(0, 1), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101, table_init="normal", conv_init="uniform"
)
FACTS = [
    {
        "question": "The sky",
        "choices": ["is red", "is a clear blue", "fell"],
        "answer": 1,
        "text": "The sky is blue. " * 9,
    },
    {
        "question": "Grass, as everybody knows,",
        "choices": ["is green", "sings"],
        "answer": 0,
        "text": "Grass is green.",
    },
    {"question": "Blood", "choices": ["is thicker than water", "runs"], "answer": 0, "text": "Blood runs. " * 5},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: facts.jsonl
test_split: test
output_type: {kind}
"""
CHOOSE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
READ = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""
ANSWER = """
doc_to_text: "{{question}}"
doc_to_target: "is"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list:
  - metric: exact_match
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    kinds = {
        "choose": ("multiple_choice", CHOOSE),
        "read": ("loglikelihood_rolling", READ),
        "answer": ("generate_until", ANSWER),
    }
    for name, (kind, rest) in kinds.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind) + rest)
    return folder


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    return train_tokenizer(["any"], 257, cache=tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def own(bytewise):
    """Return a small Transformer whose memory changes its predictions."""
    torch.manual_seed(0)
    memory = EngramMemory(FULL, TokenMap.from_tokenizer(bytewise), 32)
    return Transformer(TransformerConfig(257, 32, layers=2, heads=2, max_length=64), memory).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, bytewise):
    """Return the folders of a Llama model and of a memory that changes its predictions."""
    folder, adapter_folder = tmp_path_factory.mktemp("hf") / "llama", tmp_path_factory.mktemp("hf") / "memory"
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=257, max_position_embeddings=256, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engram.attach(model, FULL, tokenizer).save(adapter_folder)
    return folder, adapter_folder


def instances(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, a, i, ("test", i, 1)) for i, a in enumerate(arguments)]


@torch.no_grad()
def plain_loop(logits_of, ids: list[int], scored: int) -> float:
    """Return the log-likelihood of the last `scored` ids of one sequence, computed one position at a time."""
    logits = logits_of(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return sum(float(logits[t - 1, ids[t]]) for t in range(len(ids) - scored, len(ids)))


def pairs() -> list[tuple[str, str]]:
    return [(fact["question"], f" {choice}") for fact in FACTS for choice in fact["choices"]]


def test_choices_get_the_same_scores_as_from_a_plain_loop(own, bytewise):
    given = [("", "alone"), *pairs()]
    scored = adapter(own, bytewise).loglikelihood(instances("loglikelihood", *given), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(given, scored, strict=True):
        ids = [0, *bytewise.encode(context + continuation).ids]
        assert score == pytest.approx(plain_loop(own, ids, len(continuation)), rel=1e-5)


@torch.no_grad()
def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(own, bytewise):
    lm, context = adapter(own, bytewise), [0, 84, 104, 101]
    likeliest = int(own(torch.tensor([context]))[0, -1].argmax())
    given = [(("", ""), context, [token]) for token in (likeliest, (likeliest + 1) % 257)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(given)] == [True, False]


def test_texts_get_the_same_scores_as_from_a_plain_loop(own, bytewise):
    texts = [fact["text"] for fact in FACTS]
    scored = adapter(own, bytewise).loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)))
    for text, score in zip(texts, scored, strict=True):
        ids, wanted, begin = [0, *bytewise.encode(text).ids], 0.0, 1
        while begin < len(ids):  # windows of 64, the last one moved back so that it is full
            stop = min(begin + 64, len(ids))
            wanted += plain_loop(own, ids[max(0, stop - 65) : stop], stop - begin)
            begin = stop
        assert score == pytest.approx(wanted, rel=1e-5)


def test_the_perplexity_of_short_texts_equals_that_of_engram_evaluate(own, bytewise, files):
    short = Document("b", FACTS[1]["text"], "test")
    mine = evaluate(own, encode(bytewise, [short]))
    (score,) = adapter(own, bytewise).loglikelihood_rolling(instances("loglikelihood_rolling", (short.text,)))
    assert -score == pytest.approx(float(mine.document_nats[0]), rel=1e-5)


def test_a_whole_task_gives_accuracy_and_bits_per_byte(own, bytewise, files):
    lm = adapter(own, bytewise)
    report = run_tasks(lm, load_tasks(["choose", "read", "answer"], files))
    found = {(row["task"], row["metric"]): row for row in report["results"]}
    assert set(found) == {("choose", "acc"), ("read", "bits_per_byte"), ("answer", "exact_match")}
    best = []
    for fact in FACTS:
        scores = [
            plain_loop(own, [0, *bytewise.encode(f"{fact['question']} {c}").ids], len(c) + 1) for c in fact["choices"]
        ]
        best.append(int(np.argmax(scores)) == fact["answer"])
    assert found["choose", "acc"]["value"] == pytest.approx(np.mean(best))
    nats = -sum(lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((f["text"],) for f in FACTS))))
    wanted = nats / math.log(2) / sum(len(fact["text"]) for fact in FACTS)
    assert found["read", "bits_per_byte"]["value"] == pytest.approx(wanted, rel=1e-6)


def test_prompts_of_unequal_length_get_the_same_answers_in_a_batch_as_alone(own, bytewise):
    lm = adapter(own, bytewise)
    requests = [(fact["question"], {"until": ["."], "max_gen_toks": 6}) for fact in FACTS * 2]
    together = lm.generate_until(instances("generate_until", *requests))
    assert together == [lm.generate_until(instances("generate_until", one))[0] for one in requests]
    assert len(set(together)) > 1


def test_requests_that_the_model_cannot_score_or_generate_raise(own, bytewise):
    lm = adapter(own, bytewise)
    with pytest.raises(ValueError, match="adds 70 tokens"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b" * 70)), disable_tqdm=True)
    with pytest.raises(ValueError, match="adds 0 tokens"):
        lm.loglikelihood(instances("loglikelihood", ("a", "")), disable_tqdm=True)
    with pytest.raises(ValueError, match="64 new tokens"):
        lm.generate_until(instances("generate_until", ("a", {"until": [], "max_gen_toks": 64})))
    with pytest.raises(ValueError, match="not supported: this adapter generates greedily"):
        lm.generate_until(instances("generate_until", ("a", {"do_sample": True, "temperature": 1.0})))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x"])
def test_a_model_is_loaded_on_the_requested_device(saved, device):
    model, _ = load_pretrained(*map(str, saved), device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"} and not model.training
    with pytest.raises(ValueError, match=f"no device '{device}': torch"):
        load_pretrained(*saved, device=device)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_error_for_a_model_folder_without_a_tokenizer_tells_how_to_add_one(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: .* tokenizer\.save_pretrained"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_transformers_model_with_memory_gets_the_same_scores_as_from_a_plain_loop(saved, batch_size):
    model, tokenizer = load_pretrained(*saved)
    lm = adapter(model, tokenizer, batch_size)
    for (context, continuation), (score, _) in zip(
        pairs(), lm.loglikelihood(instances("loglikelihood", *pairs()), disable_tqdm=True), strict=True
    ):
        ids = tokenizer(context + continuation).input_ids
        assert score == pytest.approx(
            plain_loop(lambda x: model(x.to(model.device)).logits.cpu(), ids, len(continuation)), rel=1e-5
        )
    texts = [(fact["text"],) for fact in FACTS]
    for (text,), score in zip(texts, lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)), strict=True):
        ids = [lm.prefix_token_id, *tokenizer(text).input_ids]
        assert score == pytest.approx(
            plain_loop(lambda x: model(x.to(model.device)).logits.cpu(), ids, len(ids) - 1), rel=1e-5
        )


def test_left_padded_prompts_with_memory_get_the_same_answers_in_a_batch_as_alone(saved):
    model, tokenizer = load_pretrained(*saved)
    requests = [(fact["question"], {"until": ["."], "max_gen_toks": 6}) for fact in FACTS]
    together = adapter(model, tokenizer).generate_until(instances("generate_until", *requests), disable_tqdm=True)
    alone = adapter(model, tokenizer, batch_size=1).generate_until(
        instances("generate_until", *requests), disable_tqdm=True
    )
    assert together == alone and len(set(together)) > 1


def cli(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["engram", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_the_command_scores_a_model_with_and_without_its_memory(saved, files, monkeypatch, capsys):
    folder, memory = saved
    arguments = ("evaluate", folder, "--tasks", "read", "--task-files", files, "--limit", 2, "--json")
    values = []
    for more in ((), ("--memory", memory)):
        code, out, _ = cli(monkeypatch, capsys, *arguments, *more)
        report = json.loads(out)
        assert code == 0 and report["results"][0]["documents"] == 2
        values.append(report["results"][0]["value"])
    assert values[0] != values[1]


HUB = "task: far\ndataset_path: nowhere/no-such-data\ntest_split: test\noutput_type: multiple_choice\n" + CHOOSE


def test_each_problem_with_a_task_is_reported_in_one_line(saved, files, monkeypatch, capsys, tmp_path):
    (tmp_path / "far.yaml").write_text(HUB)
    (tmp_path / "gone.yaml").write_text(TASK.format(name="gone", kind="multiple_choice") + CHOOSE)
    (tmp_path / "torn.yaml").write_text("task: [")
    for arguments, message in (
        (("--tasks", "nope", "--task-files", files), "known tasks: answer, choose, read"),
        (("--tasks", "torn", "--task-files", tmp_path), "lm-eval could not read torn.yaml"),
        (("--tasks", "read", "--task-files", files / "none"), "is not a folder of task files"),
        (("--tasks", "gone", "--task-files", tmp_path), "facts.jsonl"),
        (("--tasks", "far", "--task-files", tmp_path), "is on the Hugging Face hub, which cannot be reached"),
        ((), "give the tasks to score with --tasks"),
        (("--task-files", files), "need --tasks"),
        (("--tasks", "read", "--corpus", "wiki"), "give one of them"),
        (("--tasks", "read", "--task-files", files, "--limit", "0"), "at least 1, not 0"),
    ):
        code, _, err = cli(monkeypatch, capsys, "evaluate", saved[0], *arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and message in lines[0] and err.endswith(lines[0] + "\n"), err


def test_without_lm_eval_the_command_prints_the_install_command(saved, monkeypatch, capsys):
    monkeypatch.setattr("engram.cli.models.find_spec", lambda name: None)
    code, _, err = cli(monkeypatch, capsys, "evaluate", saved[0], "--tasks", "read")
    assert code == 2 and "pip install -e '.[lm-eval]' in the project's folder" in err


def test_the_error_for_a_folder_that_is_not_a_model_names_the_folder(monkeypatch, capsys, tmp_path, files):
    code, _, err = cli(monkeypatch, capsys, "evaluate", tmp_path, "--tasks", "read", "--task-files", files)
    assert code == 2 and "neither run.json" in err and str(tmp_path) in err
