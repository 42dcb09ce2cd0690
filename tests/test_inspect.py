"""explain: the rows, gates and norms of a forward pass as it runs, for a Transformer and for models of transformers."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from rich.console import Console

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, explain
from engram.cli import main
from engram.inspect.explain import window_lengths
from engram.inspect.render import print_explanation
from engram.lm.tokenizer import train_tokenizer
from tests.hf_models import IMAGE, VOCAB, build, text

FULL = EngramConfig(
    layers=(0, 1), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101, table_init="normal", conv_init="uniform"
)
IDS = [0, 5, 9, 5, 9, 12, 7, 5]


def own(config: EngramConfig = FULL) -> Transformer:
    torch.manual_seed(0)
    memory = EngramMemory(config, TokenMap.identity(VOCAB), 32)
    return Transformer(TransformerConfig(VOCAB, 32, layers=2, heads=2, max_length=64), memory).eval()


def attached(name: str = "llama", config: EngramConfig = FULL) -> tuple[hf.PreTrainedModel, EngramMemory]:
    model = build(name)
    torch.manual_seed(1)
    return model, engram.attach(model, config, TokenMap.identity(VOCAB))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    return train_tokenizer(["any"], 257, cache=tmp_path_factory.mktemp("bpe"))


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_rows_are_those_that_the_hasher_gives(kind):
    model = own() if kind == "own" else attached()[0]
    found = explain(model, IDS, losses=False)
    memory = next(m for m in model.modules() if isinstance(m, EngramMemory))
    hashed = memory.hasher(torch.tensor([IDS]))
    for layer, facts in found.layers.items():
        assert (
            facts.rows.shape == (len(IDS), 2, 2) and (facts.rows.reshape(len(IDS), 4) == hashed[layer][0].numpy()).all()
        )
        assert (facts.rows_in_head >= 0).all()
        assert (facts.rows_in_head < np.array(memory.layout.moduli[layer])).all()
    first, again = found.layers[0].rows_in_head[[2, 4]]  # "5 9" twice
    assert (first[0] == again[0]).all() and (first[1] != again[1]).any()


@pytest.mark.parametrize("kind", ["own", "transformers"])
@torch.no_grad()
def test_what_was_added_is_what_the_block_received(kind):
    model = own() if kind == "own" else attached()[0]
    block = model.blocks[0] if kind == "own" else model.model.layers[0]
    embedding = model.embedding if kind == "own" else model.model.embed_tokens
    received = []
    handle = block.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    found = explain(model, IDS, losses=False).layers[0]
    handle.remove()
    before = embedding(torch.tensor(IDS))
    close(found.hidden[:, 0], before.norm(dim=-1))
    close(found.added[:, 0], (received[0][0] - before).norm(dim=-1))


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain", "none"])
def test_the_gate_is_the_share_of_the_value_that_is_added(gate):
    model = own(FULL.replace(conv_kernel=0, gate=gate))
    found = explain(model, IDS, losses=False)
    for layer, facts in found.layers.items():
        rows = model.memory.tables[layer].gather(torch.from_numpy(facts.rows)).flatten(1)
        value = model.memory.fusions[str(layer)].value(rows).norm(dim=-1)
        close(facts.gate[:, 0] * value.detach().numpy(), facts.added[:, 0])
        assert (facts.gate == 1).all() if gate == "none" else (0 < facts.gate).all() and (facts.gate < 1).all()


@pytest.mark.parametrize("kind", ["own", "transformers"])
@torch.no_grad()
def test_the_losses_are_the_models_and_those_without_one_update(kind, monkeypatch):
    model = own() if kind == "own" else attached()[0]
    memory = next(m for m in model.modules() if isinstance(m, EngramMemory))
    ids = torch.tensor([IDS])

    def losses():
        logits = model(ids) if kind == "own" else model(ids).logits
        return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")

    found = explain(model, IDS)
    close(found.loss[:-1], losses())
    assert np.isnan(found.loss[-1]) and np.isnan(found.loss_off[-1])
    usual = EngramMemory._fuse
    for t in range(len(IDS) - 1):

        def muted(self, layer, hidden, recall, t=t):
            update = usual(self, layer, hidden, recall)
            keep = torch.arange(len(IDS)) != t
            return update * keep[None, :, None]

        monkeypatch.setattr(EngramMemory, "_fuse", muted)
        close(found.loss_off[t], losses()[t])
    assert memory.training is False and np.abs(found.loss_off - found.loss)[:-1].max() > 1e-3


def test_long_texts_take_several_passes_and_give_the_same(monkeypatch):
    model = own()
    whole = explain(model, IDS).loss_off
    monkeypatch.setattr("engram.inspect.explain._TOKENS_AT_ONCE", 2 * len(IDS))
    close(explain(model, IDS).loss_off[:-1], whole[:-1])
    assert explain(model, IDS, losses=False).loss_off is None


@pytest.mark.parametrize("boundary", ["pad", "dead", "eos"])
def test_an_n_gram_is_the_text_that_alone_reads_the_same_rows(boundary):
    config = FULL.replace(orders=(2, 3, 4), boundary=boundary, pad_id=7, rows_per_head=10_007)
    memory = EngramMemory(config, TokenMap.identity(VOCAB), 32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 10, (1, 60), generator=generator)  # many end-of-sequence tokens (7) among them
    dead = torch.rand(1, 60, generator=generator) < 0.1
    documents = (torch.arange(60) // 25)[None]
    recall = memory.recall(ids, documents, dead=dead)
    lengths = window_lengths(memory, ids, recall)[0]
    assert (lengths[dead[0]] == 0).all() and (lengths[~dead[0]] >= 1).all() and (lengths[:, 2] == 4).any()
    for t in range(60):
        for column, order in enumerate(config.orders):
            n = int(lengths[t, column])
            assert n <= order
            if n:
                alone = memory.hasher(ids[:, t + 1 - n : t + 1])[0][0, -1].view(3, 2)[column]
                assert (recall.row_ids[0][0, t].view(3, 2)[column] == alone).all()
            if boundary == "eos":  # the text must not reach over an end, although it would read the same rows
                assert 7 not in ids[0, t + 1 - n : t]
            if 0 < n < order and t >= n:  # the n-gram was cut
                before = t - n
                ended = boundary == "eos" and ids[0, before] == 7
                assert dead[0, before] or documents[0, before] != documents[0, t] or ended


def test_n_grams_and_tokens_are_text_where_the_tokenizer_is_known(bytewise):
    torch.manual_seed(0)
    memory = EngramMemory(FULL, TokenMap.from_tokenizer(bytewise), 32)
    model = Transformer(TransformerConfig(257, 32, layers=2, heads=2, max_length=64), memory)
    found = explain(model, "Aé a", bytewise, losses=False)
    assert found.ids[0] == 0 and found.tokens[:2] == ["<|endoftext|>", "A"]
    assert found.ngrams[1] == ["<|endoftext|>A", "<|endoftext|>A"] and found.lengths[1].tolist() == [2, 2]
    assert found.ngrams[3] == ["é", "Aé"]  # the two bytes of one letter
    assert found.compressed[1] == found.compressed[-1]  # A and a have one compressed id
    assert explain(model, [0, 66], losses=False).ngrams[1] == ["0 66", "0 66"]


def test_images_are_dead_and_residual_streams_have_a_gate_each():
    ids = text(1, 10)[0]
    ids[4] = IMAGE
    found = explain(attached("gemma3_images")[0], ids, losses=False)
    assert found.dead.tolist() == [t == 4 for t in range(10)]
    assert (found.layers[0].gate[4] == 0).all() and found.ngrams[4] == ["", ""] and found.lengths[5].tolist() == [1, 1]
    model, memory = attached("deepseek_v4")
    assert memory.streams > 1
    assert explain(model, text(1, 10)[0]).layers[1].gate.shape == (10, memory.streams)


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model, memory = attached()
    model.train()
    before = model(text()).logits
    explain(model, IDS)
    assert model.training and torch.equal(model(text()).logits, before)
    assert not any(fusion._forward_hooks for fusion in memory.fusions.values())


def test_encoded_rows_are_explained_too():
    model = own(FULL.replace(head_dim=32))
    before = explain(model, IDS)
    model.memory.encode_tables("int8")
    after = explain(model, IDS)
    assert (after.layers[1].rows == before.layers[1].rows).all()
    assert 0 < np.abs(after.layers[1].gate - before.layers[1].gate).max() < 0.05


def test_json_holds_all_of_it():
    found = explain(own(), IDS)
    read = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert read["orders"] == [2, 3] and [token["id"] for token in read["tokens"]] == IDS
    third = read["tokens"][3]
    assert third["layers"]["1"]["rows"] == found.layers[1].rows[3].tolist()
    assert third["loss_off"] == pytest.approx(float(found.loss_off[3]))
    assert read["tokens"][-1]["loss"] is None and len(third["layers"]["0"]["gate"]) == 1


@pytest.mark.parametrize("time", [1, 2])
def test_texts_shorter_than_an_n_gram_are_explained(time):
    found = explain(own(FULL.replace(orders=(2, 4))), IDS[:time])
    assert found.lengths.tolist() == [[1, 1], [2, 2]][:time]
    assert np.isnan(found.loss).tolist() == np.isnan(found.loss_off).tolist() == [False, True][-time:]


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal_and_show_awkward_tokens(width, bytewise):
    torch.manual_seed(0)
    config = FULL.replace(heads=8, rows_per_head=500_000, layers=(1,))
    memory = EngramMemory(config, TokenMap.from_tokenizer(bytewise), 32)
    model = Transformer(TransformerConfig(257, 32, layers=2, heads=2, max_length=64), memory)
    out = io.StringIO()
    print_explanation(explain(model, "a [b]\n", bytewise), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("[" in line and "␣[" in line for line in lines) and any("⏎" in line for line in lines)
    assert sum("⊢" in line for line in lines) == 4  # both n-grams of <|endoftext|>, the trigram of a, the note


def test_what_cannot_be_explained_is_an_error():
    plain = Transformer(TransformerConfig(VOCAB, 32, layers=2, heads=2))
    with pytest.raises(ValueError, match="has no memory to explain"):
        explain(plain, IDS)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        explain(own(), "text")
    with pytest.raises(ValueError, match=r"shape \[0\]|shape \[1, 0\]"):
        explain(own(), [])
    with pytest.raises(ValueError, match=r"shape \[2, 3\]"):
        explain(own(), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(IndexError, match="outside the token map"):
        explain(own(), [1, VOCAB])
    decoder = build("llama").model
    engram.attach(decoder, FULL, TokenMap.identity(VOCAB))
    with pytest.raises(ValueError, match="returns no logits"):
        explain(decoder, IDS)


def test_the_command_explains_a_saved_model(tmp_path, bytewise, monkeypatch, capsys):
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|endoftext|>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=257, max_position_embeddings=64, **shape))
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    engram.attach(model, FULL, tokenizer).save(tmp_path / "memory")
    outputs = {}
    for name, more in (("json", ["--json"]), ("table", []), ("none", None)):
        memory = [] if more is None else ["--memory", str(tmp_path / "memory"), *more]
        monkeypatch.setattr(sys, "argv", ["engram", "explain", str(tmp_path / "llama"), "abc", *memory])
        with pytest.raises(SystemExit) as end:
            main()
        outputs[name] = (end.value.code or 0, *capsys.readouterr())
    assert [token["token"] for token in json.loads(outputs["json"][1])["tokens"]] == list("abc")
    assert "layer 1" in outputs["table"][1] and outputs["table"][0] == 0
    assert outputs["none"][0] == 2 and "has no memory to explain" in outputs["none"][2]


def test_a_compiled_model_that_has_run_is_explained_in_all_its_layers():
    model, ids = own().eval(), text(1, 8)
    expected = explain(model, ids[0])
    model.compile(backend="eager")
    with torch.no_grad():
        model(ids, recall=model.memory.recall(ids))
    found = explain(model, ids[0])
    assert sorted(found.layers) == sorted(expected.layers) != []
    close(found.loss_off[:-1], expected.loss_off[:-1])


def test_tokenizers_of_both_libraries_are_taken_for_both_kinds_of_models(bytewise):
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|endoftext|>")
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    )
    engram.attach(model, FULL, fast)
    shape = TransformerConfig(vocab_size=257, hidden_size=32, layers=3, heads=2, max_length=64)
    for each in (model, Transformer(shape, EngramMemory(FULL, TokenMap.from_tokenizer(bytewise), 32))):
        one, other = (explain(each, "abc", tokenizer) for tokenizer in (fast, bytewise))
        assert one.ids == other.ids and one.tokens == other.tokens


def test_tokens_cannot_command_the_terminal():
    from engram.inspect.render import visible

    assert visible("a\x1b[2J b\x07\x9b") == "a�[2J␣b��"
