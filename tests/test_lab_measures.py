"""What the lab measures besides the loss: counts, facts, depth, recall; and the claims that are judged by it."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engram import EngramConfig, TokenMap, TransformerConfig
from engram.ablation.statistics import Interval, over_seeds
from engram.lm.corpus import Document, Split
from engram.lm.run import Data, Setting, build_model
from engram.lm.tokenizer import END_OF_TEXT_ID, train_tokenizer
from engram.lm.train import TrainConfig
from experiments import arms
from experiments.arms import mixture
from experiments.depth.measure import alignment, cka, layer_states
from experiments.depth.measure import measure as measure_depth
from experiments.depth.summary import effective_rank, shift
from experiments.kneser_ney.configs import parts_of
from experiments.lab import caches, cell, claims, claims_page, execute, report, runner
from experiments.lab.cell import SETTINGS, Run, Table, names
from experiments.lab.claims import RULES, Finding
from experiments.lab.measures import paired, share_of, shown
from experiments.lab.results import append, write_documents
from experiments.recall import claims as recall_claims
from experiments.recall import task
from experiments.recall.summary import accuracy, half_way, learned_after
from experiments.recall.task import KEYS, VALUES, VOCABULARY, Task
from experiments.scripts.codecs import claims as storing_claims
from experiments.scripts.codecs import summary as storing
from experiments.sensitivity import facts as facts_module
from experiments.sensitivity import measure as sensitivity
from experiments.sensitivity.facts import Fact, fact_of
from experiments.sensitivity.summary import learned_retention, never_taught, retention, retention_gap
from experiments.tokens.summary import tokens_for, twice_the_tokens, worth

TASK = Task(3, 2, 5)
SETTING = Setting(
    "recall:3/2+5",
    VOCABULARY,
    TransformerConfig(vocab_size=VOCABULARY, hidden_size=16, layers=2, heads=2, max_length=TASK.length),
    EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=4, rows_per_head=97),
    TrainConfig(tokens=4 * 8 * TASK.length, batch_size=8, context=TASK.length, warmup_steps=2),
)
MEASURED = [name for name in names() if cell.hook(name, "measure")]


@pytest.fixture(scope="module")
def data():
    train, held = task.documents_of(TASK, 500, 0), task.documents_of(TASK, 40, 1)
    made = task._encoded(train, TASK.questions), task._encoded(held, TASK.questions)
    return Data(None, TokenMap.identity(VOCABULARY), *made, caches.Overlap(0.0), "toy")  # type: ignore[arg-type]


@pytest.fixture
def small_texts(data, monkeypatch):
    """prepare() without making the whole task."""
    monkeypatch.setattr(execute, "prepare", lambda setting, held_out="validation": data)
    monkeypatch.setattr(mixture, "prepare", lambda setting, held_out="validation": data)


def noisy(model):
    """The model with rows that are not zero, so that the memory says something."""
    for table in model.memory.tables.values():
        table.tensor.normal_()
    return model


# Kneser-Ney


def test_counts_alone_answer_without_a_model(data, small_texts):
    record, _ = execute.execute(Run("toy", "kneser-ney", SETTING, (("base", "none"),)))
    assert record["extra"]["weight"] == 1 and record["flops_per_token"]["forward"] == 0 < record["bytes"]["table"]
    model = arms.build("kneser-ney", SETTING, data, base="none")
    log = execute.train(model, data.train, SETTING.train)
    mixed = arms.finish("kneser-ney", model, SETTING, data, base="none")
    assert log.curve[0][1] == pytest.approx(math.log(VOCABULARY)) and mixed.weight == 1
    ids = torch.from_numpy(data.validation.ids[: TASK.length]).long()[None]
    assert torch.equal(mixed(ids), mixed.other(ids).log())
    assert mixed(ids).exp().sum(-1).sub(1).abs().max() < 1e-5


def test_counts_beside_engram_are_stored_on_top_of_its_table(data, small_texts):
    alone = arms.finish("kneser-ney", build_model(SETTING, "plain", data.token_map), SETTING, data)
    engram = arms.build("kneser-ney", SETTING, data, base="engram")
    table = sum(table.nbytes for table in engram.memory.tables.values())
    both = arms.finish("kneser-ney", engram, SETTING, data, base="engram")
    assert table > 0 and arms.tables(both)["bytes"] == arms.tables(alone)["bytes"] + table


def test_a_base_that_does_not_exist_is_refused(data):
    with pytest.raises(ValueError, match="base is 'plain', 'engram', 'none', not 'moe'"):
        arms.build("kneser-ney", SETTING, data, base="moe")


def test_engram_with_counts_has_the_bytes_of_engram():
    runs = {(run.table, run.variant): run for run in cell.questions("kneser_ney").configs("tiny")}
    for (table, variant), run in runs.items():
        if variant.startswith("engram + "):
            whole = runs[table, variant.replace("engram + kneser-ney", "engram")]
            assert 2 * run.setting.memory.rows_per_head == whole.setting.memory.rows_per_head


@pytest.mark.parametrize("size", SETTINGS)
def test_what_counts_stand_beside_is_read_from_the_fields_of_a_result(size):
    for run in cell.questions("kneser_ney").configs(size):
        record = {"arm": run.arm, "options": dict(run.options), "setting": json.loads(run.setting.to_json())}
        name, rows = parts_of(record)
        assert run.variant == (name if rows is None else f"{name}, {rows:,} rows")


# The hooks of the runner


def test_an_experiment_measures_with_the_model_that_was_evaluated(small_texts, monkeypatch):
    seen = []

    def measure(run, model, data):
        seen.append(model(torch.zeros(1, 2, dtype=torch.int64)).shape)
        return {"share": 0.5, "states": np.ones((2, 3), np.float16)}

    monkeypatch.setattr(execute, "hook", lambda name, what: measure if what == "measure" else None)
    run = Run("toy", "engram", SETTING)
    record, documents = execute.execute(run)
    assert seen == [(1, 2, VOCABULARY)] and record["measures"] == {"share": 0.5} and record["key"] == run.key
    np.testing.assert_array_equal(documents["measured_states"], np.ones((2, 3), np.float16))
    json.dumps(record)


@pytest.mark.parametrize(
    "other, measures, taken",
    [("toy", {}, True), ("toy", None, False), ("elsewhere", {}, False), ("elsewhere", None, False)],
)
def test_a_run_without_its_own_measures_is_made_again(other, measures, taken, tmp_path, monkeypatch):
    run = Run("toy", "plain", SETTING)
    record = {"key": run.key, "variant": run.variant, "size": run.size}
    (tmp_path / other).mkdir()
    append(tmp_path / other / "results.jsonl", record | ({} if measures is None else {"measures": measures}))
    monkeypatch.setattr(runner, "hook", lambda name, what: len if (name, what) == ("toy", "measure") else None)
    there = runner._is_done(tmp_path, run) or runner._take_over(tmp_path, run, ("elsewhere",))
    assert there == taken


def test_a_measured_run_serves_an_experiment_that_needs_the_loss_alone(tmp_path):
    run = Run("toy", "plain", SETTING)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "toy").mkdir()
    record = {"key": run.key, "variant": run.variant, "size": run.size, "measures": {}}
    append(tmp_path / "elsewhere" / "results.jsonl", record)
    assert runner._take_over(tmp_path, run, ("elsewhere",))


# Statistics over seeds


def test_the_interval_over_seeds_is_students():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.303 / math.sqrt(3)) == 2 - found.low


def test_one_seed_has_no_interval():
    assert over_seeds([1.5]) == Interval(1.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="needs at least one value"):
        over_seeds([])


def test_differences_are_taken_within_seeds():
    ours, theirs = (
        {seed: {"measures": seed * 10 + shift} for seed in seeds} for seeds, shift in (((0, 1, 2), 1), ((1, 2), 0))
    )
    assert paired(ours, theirs, lambda measures: measures) == Interval(1, 1, 1)


# Depth


def test_cka_is_1_up_to_rotation_and_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)


def test_cka_of_independent_states_is_0_however_wide():
    rng = np.random.default_rng(0)
    draws = [cka(rng.normal(size=(50, 200)), rng.normal(size=(50, 200))) for _ in range(40)]
    assert abs(np.mean(draws)) < 0.02  # the plain estimator gives 0.8 here


def test_cka_refuses_other_positions():
    with pytest.raises(ValueError, match="same positions"):
        cka(np.ones((5, 2)), np.ones((6, 2)))


def test_the_alignment_is_the_weighted_mean_of_the_likest_layers():
    similarity = np.array([[0.9, 0.1, 0.0], [0.0, 0.25, 0.75]])
    np.testing.assert_allclose(alignment(similarity, most=1), [0, 2])
    np.testing.assert_allclose(alignment(similarity), [0.1, 1.75])


def test_the_lens_reads_each_layer_as_if_it_were_the_last(data):
    run, model = Run("depth", "engram", SETTING), noisy(build_model(SETTING, "engram", data.token_map))
    found = measure_depth(run, model, data)
    ids, documents = (
        torch.from_numpy(part[: 32 * TASK.length].reshape(32, -1)).long()
        for part in (data.validation.ids, data.validation.documents)
    )
    model.eval()
    with torch.no_grad():
        final = model(ids, documents).softmax(-1)
        lens = model.head(model.norm(model.embedding(ids))).softmax(-1)
    assert found["lens_kl"][0] == pytest.approx(float((final * (final / lens).log()).sum(-1).mean()), rel=1e-4)
    assert found["lens_kl"][-1] == 0 and min(found["lens_kl"][:-1]) > 0
    assert found["states"].shape == (3, 320, 16) and found["tokens"] == 32 * TASK.length


def test_the_states_of_a_pass_lead_to_its_logits_and_leave_no_hook(data):
    model = noisy(build_model(SETTING, "engram", data.token_map)).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        states = layer_states(model, ids)
        assert torch.equal(model.head(model.norm(states[-1])), model(ids)) and len(states) == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_whose_layers_are_plains_next_ones_is_a_layer_deeper(tmp_path):
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(40, 5)) for _ in range(6)]
    states = {"plain": layers[:5], "engram": [layers[0], *layers[2:5], layers[4]]}
    runs = {label: {seed: {"key": f"{label}{seed}"} for seed in (0, 1)} for label in states}
    for label, seed in ((label, seed) for label in states for seed in (0, 1)):
        noise = 0.01 * rng.normal(size=(5, 40, 5))
        write_documents(tmp_path, f"{label}{seed}", {"measured_states": np.array(states[label]) + noise})
    deeper = shift(tmp_path, runs["engram"], runs["plain"])
    assert deeper.mean == pytest.approx(2 / 3, abs=0.3)  # of the three from the memory on two are the next one
    assert shift(tmp_path, runs["engram"], {0: runs["plain"][0]}) is None


# Recall


@pytest.mark.parametrize("made", [Task(1, 1, 0), Task(3, 2, 5), Task(8, 8, 0), Task(KEYS, 1, 2)])
def test_keys_are_asked_once_and_their_answers_stand_in_the_text(made):
    for text in task.documents_of(made, 20, seed=0).tolist():
        bar = made.asked[0]
        keys = [place for place in range(1, bar) if 1 <= text[place] <= KEYS]
        asked = {text[place]: text[place + 1] for place in made.asked}
        pairs = {text[place]: text[place + 1] for place in keys}
        assert asked.items() <= pairs.items() and (len(asked), len(pairs)) == (made.questions, made.pairs)
        assert all(KEYS < value <= KEYS + VALUES for value in asked.values())
        assert len({*pairs.values()}) == made.pairs  # no value twice
        assert len(text) == made.length and text[0] == END_OF_TEXT_ID
        assert sum(KEYS + VALUES < token < task.BLANK for token in text) == made.filler


def test_seeds_make_other_documents_and_the_held_out_ones_are_new():
    first, again, held = (task.documents_of(TASK, 50, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not {tuple(row) for row in first} & {tuple(row) for row in held}


@pytest.mark.parametrize(
    "name",
    ["recall:", "recall:3", "recall:0/0+3", "recall:17/1+0", "recall:2/3+0", "recall:2/1+-1", "wiki", "recall:two"],
)
def test_a_task_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"recall:pairs/questions\+filler"):
        Task.of(name)


class Copies(torch.nn.Module):
    """A model that predicts for a token what followed its first occurrence in the text."""

    memory = None

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        for row, time in np.ndindex(*ids.shape):
            first = int((ids[row] == ids[row, time]).nonzero()[0])
            if first < time:
                logits[row, time, ids[row, first + 1]] = 50
        return logits


def test_a_model_that_copies_has_all_answers_right(data):
    found = task.measure(Run("recall", "plain", SETTING), Copies(), data)
    assert found["on"]["accuracy"] == 1 and found["on"]["nats"] == pytest.approx(0, abs=1e-6)
    assert found["on"]["keyless"] == 0 and [*found] == ["on"]


def test_a_model_that_looks_at_no_key_is_right_as_often_as_it_guesses_a_value_of_the_text(data):
    class First(Copies):
        """A model that predicts the first value of the text, whatever the key."""

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, VOCABULARY)
            for row, text in enumerate(ids.tolist()):
                logits[row, :, next(token for token in text if KEYS < token <= KEYS + VALUES)] = 50
            return logits

    found = task.measure(Run("recall", "plain", SETTING), First(), data)["on"]
    assert found["accuracy"] == found["keyless"] == pytest.approx(1 / TASK.pairs, abs=0.15)


def test_no_answer_stands_in_what_a_model_reads(data):
    text = torch.from_numpy(data.validation.ids).long().view(-1, TASK.length)
    for read in (task.without_answers(text, TASK), task.without_answers(task.of_other_texts(text, TASK), TASK)):
        assert (read[:, TASK.asked + 1] == task.BLANK).all() and (read == task.BLANK).sum() == len(read) * 2
    others = task.of_other_texts(text, TASK)
    assert not any({*row[TASK.asked].tolist()} & {*row[: TASK.asked[0]].tolist()} for row in others)
    with pytest.raises(ValueError, match="16 pairs leave fewer than 1 of 16 keys"):
        task.of_other_texts(text, Task(16, 1, 0))


def test_the_memory_is_switched_off_for_one_measurement_and_on_again(data):
    model = noisy(build_model(SETTING, "engram", data.token_map))
    memory, run = model.memory, Run("recall", "engram", SETTING)
    found = task.measure(run, model, data)
    assert model.memory is memory and model.training and found["on"]["nats"] != found["off"]["nats"]
    model.memory = None
    assert task.measure(run, model, data) == {"on": found["off"]}


def test_recall_scores_the_answers_and_nothing_else(data):
    run = Run("recall", "plain", SETTING)
    model = arms.build("plain", SETTING, data)
    found, measured = task.evaluate(run, model, data), task.measure(run, model, data)["on"]
    assert found.loss == pytest.approx(measured["nats"], abs=1e-5)
    assert found.loss == pytest.approx(found.document_nats.sum() / found.document_tokens.sum())
    assert found.bits_per_byte == pytest.approx(found.document_nats.sum() / np.log(2) / data.validation.bytes.sum())


def test_recall_trains_at_the_answers_alone(data):
    _, targets, _ = execute.train.__globals__["Batches"](data.train, TASK.length, 8)(0)
    masked = task.only_answers(targets, TASK)
    assert ((masked != -100).sum(1) == TASK.questions).all()
    assert ((masked == -100) | ((masked > KEYS) & (masked <= KEYS + VALUES))).all()


def test_recall_learns_and_logs_like_any_training(data):
    setting = cell.change(SETTING, train={"tokens": 60 * 8 * TASK.length, "lr": 1e-2})
    model = build_model(setting, "engram", data.token_map)
    log = task.train(Run("recall", "engram", setting), model, data)
    assert len(log.curve) == 60 and log.tokens == 60 * 8 * TASK.length and log.row_state_bytes > 0
    assert np.mean([loss for _, loss in log.curve[-5:]]) < log.curve[0][1] - 0.5
    assert any(table.tensor.abs().max() > 0 for table in model.memory.tables.values())


def test_recall_trains_on_no_document_twice(data):
    setting = cell.change(SETTING, train={"tokens": 63 * 8 * TASK.length})
    with pytest.raises(ValueError, match="63 steps of 8 documents need more than the 499"):
        task.train(Run("recall", "plain", setting), None, data)
    for name in SETTINGS:
        for run in cell.questions("recall").configs(name):
            assert run.setting.train.steps * run.setting.train.batch_size < task.TRAIN_DOCUMENTS


def test_tokens_for_a_loss_lie_on_a_line_over_their_logarithm():
    curve = [(1.0, 4.0), (4.0, 3.0), (16.0, 2.0)]
    assert tokens_for(3.5, curve) == (2.0, 2.0) and tokens_for(2.0, curve) == (16.0, 16.0)
    assert tokens_for(1.9, curve) == (16.0, math.inf) and tokens_for(4.5, curve) == (0.0, 1.0)
    assert tokens_for(2.5, [*curve[:2], (16.0, 3.5), (64.0, 1.0)])[0] > 16  # the loss rose in between


def test_what_a_memory_is_worth_is_a_mean_of_ratios_or_a_bound():
    plain = {0: [(1.0, 4.0), (4.0, 3.0)], 1: [(1.0, 5.0), (4.0, 4.0)]}

    def runs(*losses):
        return [{"seed": seed, "bpb": loss, "tokens": 2.0} for seed, loss in enumerate(losses)]

    assert worth(runs(3.5, 4.5), plain) == "1.00 (1.00 .. 1.00)"
    assert worth(runs(3.0, 5.0 - 1e-9), plain).startswith("1.00 (0.00 .. ")  # 2 and 1/2, far apart
    assert worth(runs(3.5), plain) == "1.00 (one seed)"
    assert worth(runs(2.9, 3.9), plain) == "over 2.0"
    assert worth(runs(3.5, 3.9), plain) == "over 1.0, 1.00 in 1 of 2 seeds"
    assert worth(runs(4.5, 5.5), plain) == "under 0.5"


@pytest.mark.parametrize(
    ("nats", "after"),
    [
        ([2.0, 1.0, 0.0], 2.5),  # crosses 0.5 half way from the second point to the third
        ([0.4, 0.3], 1.0),  # the first point is below: nothing is known of before
        ([2.0, 0.5, 0.5], None),  # at it is not below it
        ([2.0, 0.0, 2.0], 1.75),  # the first time counts
    ],
)
def test_recall_is_learned_where_the_loss_falls_below_half_of_a_guess(nats, after):
    run = {"setting": {"corpus": "recall:4/2+0"}, "curve": [[1e6 * (at + 1), value] for at, value in enumerate(nats)]}
    scale = half_way(run) / 0.5  # values above are in units in which a guess costs 1
    run["curve"] = [[tokens, scale * value] for tokens, value in run["curve"]]
    assert half_way(run) == math.log(4) / 2 and learned_after(run) == (after and pytest.approx(after))


def test_what_is_learned_in_half_the_tokens_is_a_doubling_sooner():
    def run(tokens):
        return {"setting": {"corpus": "recall:4/4+0"}, "curve": [[tokens, 0.0]], "tokens": 8e6}

    labels = {"engram": {0: run(1e6), 1: run(2e6)}, "plain": {0: run(2e6), 1: run(4e6), 2: run(1.0)}}
    assert recall_claims.learned_sooner("engram")(None, labels) == pytest.approx((-1.0, -1.0, -1.0))
    assert recall_claims.learned_sooner("engram, slow rows")(None, labels) is None
    labels["plain"] = {seed: {**one, "curve": [[1e6, 9.0]]} for seed, one in labels["plain"].items()}
    assert (
        recall_claims.learned_sooner("engram")(None, labels).mean == -2.5
    )  # plain never learned: 8 and 4 times, at least
    labels["engram"][1] = labels["plain"][1]
    assert recall_claims.learned_sooner("engram")(None, labels).mean == -3.0  # of the seed in which one of them did
    assert recall_claims.learned_sooner("engram")(None, {"engram": labels["plain"], "plain": labels["plain"]}) is None


def test_a_text_without_a_tokenizer_survives_its_folder(data, tmp_path):
    caches.save(tmp_path / "text", data)
    read = caches.load(tmp_path / "text")
    assert read.tokenizer is None and read.token_map.digest == data.token_map.digest
    assert all(np.array_equal(a, b) for a, b in zip(read.train, data.train, strict=True))


def test_windows_that_are_not_documents_are_refused(data):
    setting = cell.change(SETTING, train={"context": 7})
    with pytest.raises(ValueError, match="16 tokens, context is 7"):
        task.train(Run("recall", "plain", setting), None, data)


# Facts


def test_ended_lives_were_and_all_else_is():
    assert fact_of("Mozart", "Composer (1756–1791)").text == "Mozart was Composer (1756–1791)"
    assert fact_of("Lego", "Plastic toy").prompt == "Lego is"
    assert fact_of("Cher", "American singer (born 1946)").prompt == "Cher is"


@pytest.fixture
def wiki(tmp_path, monkeypatch):
    """Articles named after their numbers, and descriptions of them."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(40)]
    text = [f"{' '.join(rng.choice(words, 20))}. w{i} {' '.join(rng.choice(words, 8))}." for i in range(40)]
    documents = [Document("wiki", f"T{i}", f"T{i}\n\n{text[i]}") for i in range(40)]
    described = {str(i): {"title": f"T{i}", "description": f"thing {i} of {words[i]}"} for i in range(40)}
    described["0"]["description"] = None
    (tmp_path / "summaries.json").write_text(json.dumps(described))
    monkeypatch.setattr(facts_module, "_package_file", lambda *path: tmp_path / "summaries.json")
    monkeypatch.setattr(facts_module, "load_corpus", lambda name: documents)
    monkeypatch.setattr(facts_module, "split", lambda *_, **__: Split(documents[:30], documents[30:33], documents[33:]))
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(facts_module, "TAUGHT", 5)
    monkeypatch.setattr(facts_module, "SENTENCES", 4)
    return Setting("facts:wiki", 300)


@pytest.mark.parametrize("corpus, copies", [("facts:wiki", facts_module.COPIES), ("facts:1:wiki", 1)])
def test_taught_facts_are_in_the_training_text_as_often_as_the_corpus_says_and_no_others_are(wiki, corpus, copies):
    wiki = replace(wiki, corpus=corpus)
    lines = facts_module.lines_of(wiki)
    taught, untaught = lines.taught, lines.untaught
    made = caches.make(wiki, "validation")
    text = [made.tokenizer.decode(ids[1:].tolist()) for ids in np.split(made.train.ids, made.train.starts[1:-1])]
    assert len(taught) == len(untaught) == 5 and not any(text.count(fact.text) for fact in untaught)
    assert {text.count(line.text) for line in taught + lines.prose} == {copies}
    assert len(text) == 30 + (5 + 4) * copies


def test_facts_are_of_articles_on_the_training_side(wiki):
    lines = facts_module.lines_of(wiki)
    titles = {fact.title for fact in lines.taught + lines.untaught}
    assert titles < {f"T{i}" for i in range(1, 30)} and len(titles) == 10


def test_prose_is_of_other_articles_than_the_facts_and_new_prose_of_held_out_ones(wiki):
    lines = facts_module.lines_of(wiki)
    facts, prose, new = ({line.title for line in part} for part in (lines.taught, lines.prose, lines.new_prose))
    assert len(prose) == 4 and prose < {f"T{i}" for i in range(30)} and not prose & facts
    assert len(new) == 4 and new < {f"T{i}" for i in range(33, 40)}
    for line in lines.prose:
        number = int(line.title[1:])
        assert line.text.startswith(f"w{number} ") and len(line.prompt.split()) == 3 and line.answer[0] == " "


def test_what_is_held_out_has_no_facts(wiki):
    made = caches.make(wiki, "validation")
    assert len(made.validation.bytes) == 7 and caches.make(wiki, "tune").digest == made.digest


def test_a_corpus_without_facts_is_refused():
    for corpus in ("facts:kjv", "facts:2:wiki", "wiki"):
        with pytest.raises(ValueError, match="a list of corpora with 'wiki'"):
            facts_module.lines_of(Setting(corpus))


class Knows(torch.nn.Module):
    """A model that continues the known texts that begin like its input, with no preference after other inputs."""

    memory, training = None, False

    def __init__(self, texts, vocab):
        super().__init__()
        self.texts, self.vocab = texts, vocab
        self.embedding = torch.nn.Embedding(1, 1)
        self.config = TransformerConfig(vocab, max_length=64)

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.vocab)
        for row, time in np.ndindex(*ids.shape):
            seen = ids[row, 1 : time + 1].tolist()
            for text in self.texts:
                if text[: len(seen)] == seen and len(text) > len(seen):
                    logits[row, time, text[len(seen)]] += 20
        return logits


def test_a_model_that_knows_a_fact_says_it():
    facts = [Fact(f"T{i}", f"T{i} is", f" {answer}") for i, answer in enumerate(("red", "green", "blue", "blue"))]
    tokenizer = train_tokenizer(["T0 is red green blue"], 257)
    texts = [tokenizer.encode(fact.text).ids for fact in facts]
    everything = sensitivity.ask(Knows(texts, 257), tokenizer, facts)
    assert (everything["exact"], everything["top1"]) == (1, 1) and everything["nats"] < 1e-4
    half = sensitivity.ask(Knows(texts[:2], 257), tokenizer, facts)
    assert half["exact"] == 0.5


def test_scores_are_of_the_tokens_behind_the_prompt_whatever_the_order():
    lines = [([0, 1, 2, 3, 4], 3), ([0, 5, 6], 2), ([0, 1, 9], 2)]
    nats, hits = sensitivity.score(Knows([[1, 2, 3, 4], [5, 6]], 10), lines, batch=2)
    assert [len(part) for part in nats] == [2, 1, 1]
    assert [part.tolist() for part in hits] == [[True, True], [True], [False]]


def test_pairs_that_stood_in_the_text_before_are_found():
    assert sensitivity.occurred_before([1, 2, 3, 1, 2, 2]).tolist() == [False, False, False, True, False]


def test_what_is_left_of_a_share_and_of_what_saying_it_added():
    on = {"taught_top1": 0.9, "untaught_top1": 0.3, "prose_top1": 0.5, "new_prose_top1": 0.1, "reading_top1": 0.4}
    off = {"taught_top1": 0.2, "untaught_top1": 0.2, "prose_top1": 0.2, "new_prose_top1": 0.1, "reading_top1": 0.3}
    measures = {"on": on, "off": off}
    assert retention("reading_top1")(measures) == pytest.approx(0.75)
    assert retention("reading_top1")({"on": on}) is None
    assert retention("reading_top1")({"on": on | {"reading_top1": 0.01}, "off": off}) is None
    assert learned_retention("taught_top1")(measures) == 0
    assert learned_retention("prose_top1")(measures) == pytest.approx(0.25)
    assert learned_retention("prose_top1")({"on": on | {"prose_top1": 0.1}, "off": off}) is None
    assert retention_gap({0: {"measures": measures}}).mean == pytest.approx(-0.25)


def test_facts_never_taught_are_compared_with_the_memory_on_seed_by_seed():
    ours, plain = (
        {seed: {"measures": {"on": {"untaught_nats": nats + seed}}} for seed in seeds}
        for nats, seeds in ((4.5, (0, 1)), (4.0, (0, 1, 2)))
    )
    ours[0]["measures"]["off"] = {"untaught_nats": 9.0}
    assert never_taught(ours, plain) == pytest.approx((0.5, 0.5, 0.5))


# Tables, figures, claims


def made_up(name, home, seeds=(0, 1)):
    """Results of every cell with measures such as the experiment makes: engram is the better one."""
    home.mkdir(parents=True)
    rng, tokens = np.random.default_rng(0), np.full(20, 50.0)
    for run in (run.seeded(seed) for run in cell.questions(name).configs("tiny") for seed in seeds):
        good = float(run.arm == "engram")
        level = 0.4 + 0.3 * good + 0.01 * rng.random()
        states = {"on": level, "off": 0.2} if run.arm != "plain" else {"on": level}
        measures = {
            "depth": {"lens_kl": [3.0, 2.0, 1.0 - good / 2 + 0.01 * rng.random(), 0.0], "tokens": 100},
            "recall": {state: {"accuracy": v, "nats": 1.0, "keyless": 0.1} for state, v in states.items()},
            "sensitivity": {
                state: {key: {"t": value, "p": 0.4}.get(key[0], 0.1) for key in SENSITIVITY}
                for state, value in states.items()
            },
        }[name]
        nats = 50 * (4 - 0.1 * good + rng.normal(0, 0.1, 20))
        setting = json.loads(run.setting.to_json())
        record = {"key": run.key, "cell": run.kind, "experiment": name, "variant": run.variant, "size": run.size}
        record |= {"arm": run.arm, "options": dict(run.options), "held_out": run.held_out}
        record |= {"seed": run.seed, "setting": setting, "loss": nats.mean() / 50, "bpb": 1.0, "corpus": "c"}
        record["curve"] = [[1e6, 2.0], [2e6, 1.0 - good]]
        append(home / "results.jsonl", record | {"measures": measures, "tokens": 1, "train_cpu_seconds": 1.0})
        arrays = {"nats": nats, "tokens": tokens, "bytes": 3 * tokens, "measured_states": rng.normal(size=(4, 30, 6))}
        write_documents(home, run.key, arrays)
    return home


KINDS = ("taught", "untaught", "prose", "new_prose")
SENSITIVITY = [f"{kind}_{what}" for kind in KINDS for what in ("nats", "top1", "exact")]
SENSITIVITY += ["reading_nats", "reading_top1", "copied_top1"]


@pytest.mark.parametrize("name", MEASURED)
def test_figures_and_tables_are_made_from_the_measures_alone(name, tmp_path):
    home = made_up(name, tmp_path / name)
    path = importlib.import_module(f"experiments.{name}.plot").draw(home)
    assert path == home / "figure.png" and path.read_bytes()[:4] == b"\x89PNG"
    text = cell.hook(name, "summary")(home)
    assert "| engram |" in text and "nan" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") >= 4


@pytest.mark.parametrize("name", MEASURED)
def test_one_seed_is_drawn_too(name, tmp_path):
    home = made_up(name, tmp_path / name, seeds=(0,))
    assert importlib.import_module(f"experiments.{name}.plot").draw(home).is_file()
    assert "(one seed)" in cell.hook(name, "summary")(home)


@pytest.mark.parametrize("name", MEASURED)
def test_a_figure_without_measures_says_what_to_run(name, tmp_path):
    with pytest.raises(ValueError, match=f"no runs yet: python -m experiments run {name}"):
        importlib.import_module(f"experiments.{name}.plot").draw(tmp_path / name)


@pytest.mark.parametrize(
    "rule, interval, seeds, expected",
    [
        ("below", (-0.2, -0.3, -0.1), 3, "supported"),
        ("below", (-0.2, -0.3, 0.1), 3, "open"),
        ("below", (0.2, 0.1, 0.3), 3, "not supported"),
        ("below", (-0.2, -0.3, -0.1), 1, "open"),
        ("below", (-0.2, -math.inf, math.inf), 3, "open"),
        ("above", (0.2, 0.1, 0.3), 2, "supported"),
        ("above", (-0.2, -0.3, -0.1), 2, "not supported"),
        ("near", (0.0, -0.001, 0.001), 3, "supported"),
        ("near", (0.004, 0.001, 0.008), 3, "open"),
        ("near", (0.1, 0.05, 0.2), 3, "not supported"),
        ("near", (-0.1, -0.2, -0.05), 3, "not supported"),
        ("no worse", (-0.1, -0.2, 0.001), 3, "supported"),
        ("no worse", (0.1, 0.05, 0.2), 3, "not supported"),
        ("worse", (0.1, 0.05, 0.2), 3, "supported"),
        ("worse", (-0.1, -0.2, 0.001), 3, "not supported"),
        ("worse", (0.01, -0.01, 0.03), 3, "open"),
    ],
)
def test_verdicts_follow_from_the_interval(rule, interval, seeds, expected):
    assert claims.verdict(Finding(Interval(*interval), seeds), rule) == expected


# The rules as they were before claims were worded about the memory: (rule, turned round?) of each rule of today.
EARLIER = {
    "below": [("below", False), ("above", True)],
    "above": [("above", False)],
    "near": [("near", False)],
    "above -0.03": [("above -0.03", False)],
    "no worse": [("no worse", False)],
    "worse": [("no worse", True)],
}
EARLIER_RULES = {
    "below": (lambda i: i.high < 0, lambda i: i.low > 0),
    "above": (lambda i: i.low > 0, lambda i: i.high < 0),
    "near": (lambda i: i.low > -0.005 and i.high < 0.005, lambda i: i.low > 0.005 or i.high < -0.005),
    "above -0.03": (lambda i: i.low > -0.03, lambda i: i.high < -0.03),
    "no worse": (lambda i: i.high < 0.005, lambda i: i.low > 0.005),
}
NOW = {"agrees": "supported", "disagrees": "not supported", "cannot tell": "open"}
TURNED = {"agrees": "not supported", "disagrees": "supported", "cannot tell": "open"}


def earlier_verdict(value, seeds, rule):
    agrees, disagrees = EARLIER_RULES[rule]
    if seeds < 2 or not all(map(math.isfinite, value)):
        return "cannot tell"
    return "agrees" if agrees(value) else "disagrees" if disagrees(value) else "cannot tell"


@pytest.mark.parametrize("rule", RULES)
def test_each_earlier_verdict_has_one_of_today(rule):
    ends = (-math.inf, -0.2, -0.031, -0.03, -0.02, -0.006, -0.005, -0.001, 0.0, 0.001, 0.005, 0.006, 0.2, math.inf)
    for earlier, turned in EARLIER[rule]:
        for low, high in itertools.combinations_with_replacement(ends, 2):
            for seeds in (1, 2, 3):
                value = Interval((low + high) / 2 if math.isfinite(low + high) else 0.0, low, high)
                was = earlier_verdict(value, seeds, earlier)
                assert claims.verdict(Finding(value, seeds), rule) == (TURNED if turned else NOW)[was], (value, was)


@pytest.mark.parametrize(
    "rule, unit, interval, close",
    [
        ("below", "nats", (-0.02, -0.03, -0.012), True),
        ("below", "nats", (-0.02, -0.03, -0.014), False),
        ("below", "nats", (0.02, 0.012, 0.03), True),
        ("worse", "nats", (0.02, 0.017, 0.03), True),
        ("worse", "nats", (0.03, 0.019, 0.04), False),
        ("below", "bits", (-0.02, -0.03, -0.005), True),
        ("below", "bits", (-0.02, -0.03, -0.007), False),
        ("below", "", (-0.02, -0.03, -0.001), False),  # no loss: nothing is known of what a CPU does to it
        ("below", "nats", (0.0, -0.03, 0.02), False),  # open already
    ],
)
def test_a_verdict_that_another_cpu_could_change_is_marked(rule, unit, interval, close):
    claim = claims.Claim(claims.PAPER, "words", "measure", lambda home: [], rule, unit)
    finding = Finding(Interval(*interval), 3, note="table")
    assert claim.within_another_cpu(finding) == close
    assert (claims_page.CLOSE in claims_page.document([(claim, [finding])]).splitlines()[-1]) == close


def test_the_strongest_counter_results_come_first():
    found = claims.all_claims()
    first = [claim for claim in found if claim.counter]
    assert found[: len(first)] == first and [claim.short for claim in first] == list(range(1, len(first) + 1))
    assert {claim.question for claim in first} == {"sceptic", "tokens", "sensitivity"}
    places = sorted(claim.short for claim in found if claim.short)
    assert places == list(range(1, len(places) + 1))


def test_claims_without_runs_are_marked_as_such(tmp_path):
    found = claims_page.all_findings(tmp_path)
    lines = [line for line in claims_page.document(found).splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(claims.all_claims()) and all("not run yet" in line for line in lines)
    short = claims_page.in_short(found).splitlines()[2:]
    assert len(short) == sum(bool(claim.short) for claim in claims.all_claims())
    assert all("not run yet" in line for line in short)


def test_claims_are_filled_from_the_results(tmp_path):
    for name in MEASURED:
        made_up(name, tmp_path / name, seeds=(0, 1, 2))
    found = claims_page.all_findings(tmp_path)
    rows = [line for line in claims_page.document(found).splitlines() if line.startswith("| ")]
    lines = {line.split(" | ")[1]: line for line in rows}
    needles = [row for row in rows if "Several needles are found more often" in row]
    for row, which in zip(needles, ("4 in 8", "8 in 16"), strict=True):
        assert f"tiny: needles, {which}, 3 seeds" in row and "| supported |" in row
        assert "| +0.29" in row or "| +0.30" in row
    assert "| supported |" in lines["Switched off, facts lose more than reading"]
    assert "| supported |" in lines["Early layers are nearer to prediction"]
    assert "not run yet" in lines["The gate earns its place"]
    short = claims_page.in_short(found)
    assert "| tiny: facts:wiki, 3 seeds | below 0 | **supported** |" in short


def test_the_readme_shows_the_largest_size_with_the_most_seeds():
    everything = claims.all_claims()
    claim = next(claim for claim in everything if claim.words == "The memory lowers the loss of a dense model")
    tables = [("tiny", "b", -0.2, 3), ("small", "a", -0.3, 3), ("small", "b", -0.4, 1), ("tiny", "a", 0.1, 3)]
    found = [
        Finding(Interval(mean, mean - 0.01, mean + 0.01), seeds, Table("sceptic", size, text))
        for size, text, mean, seeds in tables
    ]
    results = [(other, found if other is claim else []) for other in everything]
    (line,) = (line for line in claims_page.in_short(results).splitlines() if claim.words in line)
    assert "-0.3000 (-0.3100 .. -0.2900) | small: a, 3 seeds | below 0 | **supported** |" in line
    assert "supported (1), not supported (1), open (1)" in line


MAIN = "wiki+shakespeare+kjv"


@pytest.mark.parametrize(
    "name, table, options",
    [
        ("sceptic", Table("sceptic", "small", MAIN), ""),
        ("sceptic", Table("sceptic", "tiny", MAIN), " --size tiny"),
        ("sceptic", Table("sceptic", "tiny", "botocore"), " --size tiny --corpus botocore"),
        ("sceptic", Table("sceptic", "tiny", MAIN, "cuda"), " --size tiny --device cuda"),
        ("tokens", Table("tokens", "tiny", "kjv", tokens=280_000), ""),
        ("lookup_or_module", Table("lookup_or_module", "tiny", MAIN, vocabulary=1024), " --size tiny"),
        ("slots", Table("slots", "tiny", MAIN), ""),
        ("slots", Table("slots", "small", MAIN), " --size small"),
    ],
)
def test_a_claim_names_the_command_that_makes_its_table(name, table, options):
    claim = next(claim for claim in claims.all_claims() if claim.question == name)
    finding = Finding(Interval(0, 0, 0), 3, table, note=", 4,096 rows")
    assert claims_page.command(claim, finding) == f"python -m experiments run {name}{options}"


def test_the_effective_rank_is_the_number_of_equal_directions():
    basis = np.concatenate([np.eye(8), -np.eye(8)])  # as much along each direction
    assert effective_rank(basis) == pytest.approx(8)
    assert effective_rank(basis * (np.arange(8) < 3)) == pytest.approx(3)
    assert 1 < effective_rank(basis * 10.0 ** -np.arange(8)) < 1.1


def line_of(experiment, arm, seed, text, tokens=1):
    """The fields of a result that its cell is made of."""
    setting = {"corpus": text, "vocab_size": 300, "train": {"tokens": tokens}, "model": {"layers": 2}}
    line = {"experiment": experiment, "arm": arm, "variant": arm, "size": "tiny", "options": {}, "seed": seed}
    return line | {"held_out": "validation", "setting": setting}


def test_a_gain_that_shrinks_along_the_tables_is_above_0(tmp_path):
    home, rng = tmp_path / "tokens", np.random.default_rng(0)
    home.mkdir()
    base, sizes = rng.normal(300, 20, 40), np.full(40, 100)
    with (home / "results.jsonl").open("w") as file:
        for millions, lead in ((1, 50), (4, 10), (2, 90)):
            for seed, arm in itertools.product((0, 1), ("plain", "engram")):
                tokens, key = 10**6 * millions, f"{millions}{seed}{arm}"
                nats = base + rng.normal(0, 0.1, 40) - lead * (arm == "engram")
                write_documents(home, key, {"nats": nats, "tokens": sizes, "bytes": sizes})
                record = {"key": key, "cell": f"{millions}{arm}", "tokens": tokens, "text_tokens": 2 * 10**6}
                record |= {"bpb": 1.0, "corpus": "c", "train_cpu_seconds": 1.0}
                file.write(json.dumps(line_of("tokens", arm, seed, "text", tokens) | record) + "\n")
    (found,) = claims.change_of_gain("tokens")(home)
    assert found.caption == "tiny: text, 1.00M tokens to tiny: text, 4.00M tokens" and found.seeds == 2
    assert found.value.mean == pytest.approx(40 / 100 / np.log(2), rel=0.01) and found.value.low > 0
    for passes, first, last, lost in (("one", 1, 2, -40), ("several", 2, 4, 80)):
        (part,) = claims.change_of_gain("tokens", passes)(home)
        assert (part.table.tokens, part.last.tokens) == (first * 10**6, last * 10**6)
        assert part.value.mean == pytest.approx(lost / 100 / np.log(2), rel=0.01)
    (late,) = claims.change_of_gain("tokens", least_tokens=2 * 10**6)(home)
    assert (late.table.tokens, late.last.tokens) == (2 * 10**6, 4 * 10**6)
    assert claims.change_of_gain("tokens", "one", least_tokens=2 * 10**6)(home) == []
    assert claims.change_of_gain("vocabulary")(tmp_path / "vocabulary") == []
    lines = (home / "results.jsonl").read_text()
    (home / "results.jsonl").write_text(lines.replace('"text_tokens": 2', '"text_tokens": 3'))
    assert claims.change_of_gain("tokens", "several")(home) == [], "1.3 passes are hardly several"
    once, twice = twice_the_tokens(home)  # there is no plain for twice the largest
    assert (once.caption, once.seeds) == ("tiny: text, 1.00M tokens", 2)
    assert twice.caption == "tiny: text, 2.00M tokens"
    assert once.value.mean == pytest.approx(0.5, rel=0.01) and twice.value.mean == pytest.approx(0.9, rel=0.01)


def test_recall_says_where_plain_knows_no_more_than_without_keys(tmp_path):
    with (tmp_path / "results.jsonl").open("w") as file:
        for text, right in (("recall:4/4+8", 0.6), ("recall:8/8+16", 0.27), ("recall:4/4+0", 0.27)):
            for seed, arm in itertools.product((0, 1), ("plain", "engram")):
                on = {"accuracy": right if arm == "plain" else 1.0 - 0.1 * seed, "keyless": 0.25}
                record = {"key": f"{text}{seed}{arm}", "cell": f"{text}{arm}", "measures": {"on": on}}
                file.write(json.dumps(line_of("recall", arm, seed, text) | record) + "\n")
    claim = next(claim for claim in recall_claims.CLAIMS if "needles" in claim.words)
    learned, not_learned = claim.figure(tmp_path)  # MQAR has no needles
    assert (learned.caption, learned.seeds) == ("tiny: needles, 4 in 8", 2)
    assert not_learned.caption == "tiny: needles, 8 in 16, not learned by plain"
    assert not_learned.value.mean == pytest.approx(0.68) and not_learned.value.low < 0.68


def test_every_variant_of_a_claim_is_one_that_its_question_runs():
    variants = {
        (name, run.variant) for name in names() for size in SETTINGS for run in cell.questions(name).configs(size)
    }
    pairs = [(claim.question, variant) for claim in claims.all_claims() for variant in claim.pair or ()]
    assert len(pairs) > 40 and set(pairs) <= variants


def test_a_summary_stands_before_the_tables_of_the_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "tables_of", lambda records: {"g": {}})
    monkeypatch.setattr(report, "rows_of", lambda *_: [])
    monkeypatch.setattr(report, "table", lambda *_: "losses")
    monkeypatch.setattr(report, "shared_fields", lambda *_: "")
    text = report.document(tmp_path, "plain", lambda home: "measures")
    assert text.index("measures") < text.index("losses")


def test_a_run_keeps_its_json_and_its_options_for_a_base():
    run = Run("kneser_ney", "kneser-ney", SETTING, (("base", "none"),))
    assert Run.from_json(run.to_json()) == run and run.key != replace(run, options=()).key


def test_the_interval_of_a_share_ends_where_shares_do():
    runs = {seed: {"measures": {"on": {"accuracy": right}}} for seed, right in enumerate((0.999, 0.483))}
    found = share_of(runs, accuracy("on"))
    assert (found.low, found.high) == (0.0, 1.0) and found.mean == pytest.approx(0.741)
    alone = share_of({0: runs[0]}, accuracy("on"))
    assert shown(alone) == "0.999 (one seed)"


# What it costs to store rows


def stored_rows(home, seed, cost, corpus="c"):
    home.mkdir(parents=True, exist_ok=True)
    sizes, nats = np.full(30, 50.0), np.random.default_rng(seed).normal(200, 20, 30)
    codecs = {"float32": nats, "fp8": nats + cost * sizes}
    write_documents(home, storing.documents_key(1000, seed), {"tokens": sizes, **codecs})
    for codec, values in codecs.items():
        line = {"codec": codec, "tokens": 1000, "seed": seed, "corpus": corpus, "row_bytes": 33, "ratio": 0.25}
        append(home / "results.jsonl", line | {"loss": values.sum() / 1500, "rms_error": 0.1, "rms": 0.4})


def test_what_stored_rows_cost_is_judged_over_trained_models(tmp_path):
    home = tmp_path / "codecs"
    for seed, cost in enumerate((0.01, 0.02, 0.03)):
        stored_rows(home, seed, cost)
    (found,) = storing_claims.fp8(home)
    assert (found.caption, found.seeds) == ("0.00M tokens", 3) and found.value.mean == pytest.approx(0.02)
    assert found.value.low < 0 and found.value.high > 0.04  # Student's, of three values
    text = storing.summary(home, 1000)
    assert "| fp8 | 33 | 0.2500 |" in text and "models of seeds 0, 1, 2" in text and "+0.02000 (" in text
    stored_rows(home, 3, 0.01, corpus="another")
    with pytest.raises(ValueError, match="of different texts: make all seeds again"):
        storing_claims.fp8(home)


def test_the_tables_of_codecs_are_those_of_its_results():
    home = cell.HOME / "scripts" / "codecs"
    assert f"\n\n{storing.summary(home, 1_100_000)}\n" in (home / "tables.md").read_text()
