"""Ids of a model that its tokenizer does not name (padded embeddings), and tokens added after training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models

import engram
from engram import EngramConfig, EngramMemory, HashLayout, NgramHasher, TokenMap, Transformer, TransformerConfig
from engram.lm.evaluate import evaluate
from engram.lm.generate import generate
from engram.lm.tokenizer import Encoded, token_ids
from tests.hf_models import CACHE, VOCAB, build, text

NAMED = 50  # of the models' 64 ids
CONFIG = EngramConfig(
    layers=(1,), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101, table_init="normal", table_std=1.0
)


def attached(name: str = "llama", config: EngramConfig = CONFIG) -> tuple[hf.PreTrainedModel, EngramMemory]:
    model = build(name)
    torch.manual_seed(1)
    return model, engram.attach(model, config, TokenMap.identity(NAMED))


def with_unnamed(batch: int = 2, time: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids of which some have no token, and the mask of those."""
    ids = text(batch, time) % NAMED
    at = torch.zeros(batch, time, dtype=torch.bool)
    at[0, [0, 5, 6]], at[1, [3, time - 1]] = True, True
    return ids.masked_fill(at, NAMED + 7), at


@pytest.mark.parametrize("boundary", ["pad", "dead", "eos"])
def test_an_id_that_the_tokenizer_does_not_name_is_like_padding(boundary: str) -> None:
    memory = EngramMemory(CONFIG.replace(boundary=boundary), TokenMap.identity(NAMED), 32)
    ids, at = with_unnamed()
    memory.vocab_size = VOCAB
    documents = torch.tensor([0, 0, 1, 1]).repeat_interleave(4)[:14].expand(2, 14)
    lookback = torch.tensor([[3, NAMED + 1], [NAMED, 4]])
    for more in ({}, {"documents": documents}, {"dead": torch.arange(14).expand(2, 14) > 11}):
        found = memory.recall(ids, **more)
        expected = memory.recall(ids.masked_fill(at, 9), **{**more, "dead": at | more.get("dead", at)})
        assert torch.equal(found.row_ids[1], expected.row_ids[1]) and torch.equal(found.dead, expected.dead)
    cut = memory.recall(ids % NAMED, lookback=lookback).row_ids[1]
    assert torch.equal(cut, memory.recall(ids % NAMED, lookback=lookback.masked_fill(lookback >= NAMED, -1)).row_ids[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gemma3_images", "deepseek_v4"])
@torch.no_grad()
def test_attached_models_take_every_id_that_they_have_embeddings_for(name: str) -> None:
    model, memory = attached(name)
    ids, at = with_unnamed()
    seen = {}
    memory.fusions["1"].register_forward_hook(lambda module, args, output: seen.update(update=output[0]))
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all() and memory.vocab_size >= VOCAB
    assert (seen["update"][at] == 0).all() and (seen["update"][~at] != 0).any()
    if name == "gemma3_images":  # it embeds the ids before the decoder sees them
        return
    with pytest.raises(IndexError, match=rf"\[0, 2\] is {memory.vocab_size}, outside the token map's vocabulary"):
        model(input_ids=torch.tensor([[3, 4, memory.vocab_size]]))
    with pytest.raises(ValueError, match=r"is -100: placeholder ids"):
        model(input_ids=torch.tensor([[3, -100, 5]]))


@torch.no_grad()
def test_sampling_and_cached_decoding_go_on_over_such_ids() -> None:
    model, _ = attached()
    ids, _ = with_unnamed()
    sampled = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=True, temperature=20.0, eos_token_id=None
    )
    assert (sampled >= NAMED).sum() > (ids >= NAMED).sum()
    cache, steps = hf.DynamicCache(), []
    for piece in sampled.split(1, dim=1):
        steps.append(model(input_ids=piece, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(input_ids=sampled).logits, rtol=1e-4, atol=1e-5)


def own(vocab_size: int = VOCAB, config: EngramConfig = CONFIG, named: int = NAMED) -> Transformer:
    torch.manual_seed(0)
    memory = EngramMemory(config, TokenMap.identity(named), 32)
    return Transformer(TransformerConfig(vocab_size, 32, layers=2, heads=2, max_length=64), memory).eval()


@torch.no_grad()
def test_a_transformer_of_a_larger_vocabulary_evaluates_generates_and_explains() -> None:
    model = own()
    ids, at = with_unnamed(1 + 1)
    whole = generate(model, ids, 20, temperature=1e3, seed=3)
    assert (whole[:, 14:] >= NAMED).any()
    assert torch.equal(whole, generate(model, ids, 20, temperature=1e3, seed=3, prefill=3, prefetch=False))
    numbers = np.zeros(14, np.int32)
    data = Encoded(ids[0].numpy().astype(np.int32), numbers, np.array([0, 14]), np.array([30]))
    assert np.isfinite(evaluate(model, data).loss)
    found = engram.explain(model, ids[0])
    assert found.dead.tolist() == at[0].tolist()
    assert [c < 0 for c in found.compressed] == at[0].tolist()
    assert (found.layers[1].gate[at[0].numpy()] == 0).all() and np.isfinite(found.loss_off[:-1]).all()
    with pytest.raises(IndexError, match="is 64, outside"):
        model(torch.tensor([[1, VOCAB]]))
    with pytest.raises(IndexError, match="is 50, outside"):  # a hasher has only the token map, not the model
        model.memory.hasher(torch.tensor([[1, NAMED]]))


@pytest.mark.parametrize("error", [IndexError, KeyError, TypeError, ValueError])
def test_explain_names_an_id_by_its_number_if_the_tokenizer_cannot(error: type[Exception]) -> None:
    class Slow:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            if any(i >= NAMED for i in ids):
                raise error("no such token")
            return "".join(f"<{i}>" for i in ids)

    found = engram.explain(own(), [3, 60, 4], Slow(), losses=False)
    assert found.tokens == ["<3>", "60", "<4>"] and found.ngrams == [["<3>", "<3>"], ["", ""], ["<4>", "<4>"]]


@torch.no_grad()
def test_embeddings_may_be_resized_and_a_memory_that_leaves_is_strict_again() -> None:
    model, memory = attached()
    model.resize_token_embeddings(90)
    model(input_ids=torch.tensor([[3, 89]]))
    with pytest.raises(IndexError, match="is 90, outside"):
        model(input_ids=torch.tensor([[3, 90]]))
    model.resize_token_embeddings(55)
    model(input_ids=torch.tensor([[3, 54]]))
    with pytest.raises(IndexError, match="is 55, outside"):
        model(input_ids=torch.tensor([[3, 55]]))
    memory.detach()
    with pytest.raises(IndexError, match="is 54, outside"):
        memory.recall(torch.tensor([[3, 54]]))


@torch.no_grad()
def test_only_the_mask_makes_padding_of_a_real_token() -> None:
    model, memory = attached()
    assert model.config.pad_token_id == 0
    ids = torch.tensor([[0, 5, 0, 6, 0]])
    assert memory.recall(ids).dead is None
    seen = []
    memory.fusions["1"].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    assert (seen[0][0] != 0).any(-1).all() and (seen[1][0] != 0).any(-1).tolist() == [False, True, True, True, True]


# Tokens added after training.


def tokenizer(*added: str) -> Tokenizer:
    words = {f"w{i}": i for i in range(NAMED - 2)} | {"The": NAMED - 2, "end": NAMED - 1}
    result = Tokenizer(models.WordLevel(words, unk_token="w0"))
    result.decoder = decoders.Fuse()
    result.add_tokens([AddedToken(token, special=token.startswith("<")) for token in added])
    return result


def saved(folder: Path) -> tuple[Path, torch.Tensor]:
    model, memory = build("llama"), None
    torch.manual_seed(1)
    memory = engram.attach(model, CONFIG, tokenizer())
    logits = model(input_ids=text() % NAMED).logits
    return memory.save(folder / "memory"), logits.detach()


@pytest.mark.parametrize("mode", ["folder", "memory", "load", "shared", "state"])
@pytest.mark.parametrize("added", [["<pad>"], ["<pad>", "<|im_start|>", "fresh"], ["<a>", "THE", "<b>", "End"]])
@torch.no_grad()
def test_a_memory_goes_on_with_a_tokenizer_that_has_gained_tokens(tmp_path: Path, added: list[str], mode: str) -> None:
    home, expected = saved(tmp_path)
    grown, model = tokenizer(*added), build("llama")
    if mode == "folder":
        memory = engram.attach(model, home, grown)
    elif mode == "memory":
        memory = engram.attach(model, EngramMemory.load(home), grown)
    elif mode == "state":
        old = TokenMap.load(home / "token_map.safetensors")
        memory = engram.attach(model, CONFIG, old.extend(grown))
        memory.load_state_dict(EngramMemory.load(home).state_dict())
    else:
        kind = "shared" if mode == "shared" else "copy"
        memory = EngramMemory.load(home, mode=kind, token_map=TokenMap.from_tokenizer(grown))
        engram.attach(model, memory, grown)
    model.eval()
    assert torch.equal(model(input_ids=text() % NAMED).logits, expected)
    ids = torch.tensor([[3, 4, *range(NAMED, NAMED + len(added)), 5]])
    recall = memory.recall(ids)
    joins = [token.lower() in ("the", "end") for token in added]
    assert recall.dead[0].tolist() == [False, False, *(not j for j in joins), False]
    old_ids = {"THE": NAMED - 2, "End": NAMED - 1}
    same = [3, 4, *(old_ids.get(token, 0) for token in added), 5]
    assert torch.equal(recall.row_ids[1], memory.recall(torch.tensor([same]), dead=recall.dead).row_ids[1])
    again = EngramMemory.load(memory.save(tmp_path / "again"), token_map=TokenMap.from_tokenizer(grown))
    assert torch.equal(again.recall(ids).row_ids[1], recall.row_ids[1])
    assert again.layout.digest == EngramMemory.load(home).layout.digest


def test_a_memory_whose_new_tokens_are_all_dead_is_saved_as_before(tmp_path: Path) -> None:
    home, _ = saved(tmp_path)
    memory = engram.attach(build("llama"), home, tokenizer("<pad>", "<x>"))
    files = [json.loads((folder / "manifest.json").read_text()) for folder in (home, memory.save(tmp_path / "again"))]
    assert files[0]["token_map"] == files[1]["token_map"]


@pytest.mark.parametrize("change", ["removed", "renamed", "inserted", "other"])
def test_a_tokenizer_that_lost_or_changed_a_token_is_still_refused(tmp_path: Path, change: str) -> None:
    home, _ = saved(tmp_path)
    words = [f"w{i}" for i in range(NAMED - 2)] + ["The", "end"]
    words = {
        "removed": words[:-1],
        "renamed": [*words[:-1], "THE"],
        "inserted": [*words[:9], "W1", *words[9:]],
        "other": [f"v{i}" for i in range(9)] + ["V1"] + words[10:] + ["more"],
    }[change]
    other = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    count, first = {"removed": (1, 49), "renamed": (1, 49), "inserted": (41, 9), "other": (41, 9)}[change]
    for act in (
        lambda: engram.attach(build("llama"), home, other),
        lambda: engram.attach(build("llama"), EngramMemory.load(home), other),
        lambda: EngramMemory.load(home, token_map=TokenMap.from_tokenizer(other)),
    ):
        with pytest.raises(
            ValueError, match=f"differ in {count} of the 50 ids, first in id {first}.*every row would be"
        ):
            act()


def test_states_and_row_files_of_a_larger_map_are_not_taken_for_those_of_a_smaller(tmp_path: Path) -> None:
    old = TokenMap.from_tokenizer(tokenizer())
    new = old.extend(tokenizer("THE"))
    small, large = (EngramMemory(CONFIG, m, 32, folder=tmp_path / str(len(m.table))) for m in (old, new))
    large.load_state_dict(small.state_dict())
    with pytest.raises(ValueError, match="another token map"):
        small.load_state_dict(large.state_dict())
    for memory in (small, large):
        memory.close()
    EngramMemory(CONFIG, new, 32, folder=tmp_path / "50").close()
    with pytest.raises(ValueError, match=r"rows of another memory \(token_map"):
        EngramMemory(CONFIG, old, 32, folder=tmp_path / "51")


def test_a_hasher_marks_dead_ids_or_refuses_them_by_name(path_of) -> None:
    token_map = TokenMap.identity(6).extend(TokenMap(np.array([0, 1, 2, 3, 4, 5, 6, 2, 7])))
    assert token_map.table.tolist() == [0, 1, 2, 3, 4, 5, -1, 2, -1]
    for boundary in ("pad", "dead", "eos"):
        layout = HashLayout.build(6, [0], [2, 3], 2, 997, pad_id=0, boundary=boundary)
        hasher = NgramHasher(layout, token_map)
        ids, lookback = np.array([[1, 7, 3, 4, 5]]), np.array([[6, 8]])
        expected = NgramHasher(layout, TokenMap.identity(6))(np.array([[1, 2, 3, 4, 5]]))[0]
        assert (hasher(ids, lookback=lookback)[0] == expected).all()
        dead = np.array([[1, 7, 8, 4, 5]])
        for kind in (np.asarray, torch.from_numpy):
            if boundary == "dead":
                marked = NgramHasher(layout, TokenMap.identity(6))(np.array([[1, 2, -1, 4, 5]]))[0]
                assert (np.asarray(hasher(kind(dead))[0]) == marked).all()
            else:
                with pytest.raises(ValueError, match=r"ids\[0, 2\] is 8, a dead id of the token map"):
                    hasher(kind(dead))
        with pytest.raises(IndexError, match="is 9, outside"):
            hasher(np.array([[1, 9]]))


def test_a_dead_pad_id_is_refused() -> None:
    token_map = TokenMap.identity(6).extend(TokenMap.identity(8))
    with pytest.raises(ValueError, match="pad_id 7 is a dead id"):
        EngramMemory(CONFIG.replace(pad_id=7), token_map, 32)


# What counts as ids.

IDS = [3, 9, 27, 4]


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        tuple(IDS),
        [IDS],
        np.array(IDS),
        np.array([IDS], np.uint16),
        np.array(IDS, np.int8),
        torch.tensor(IDS, dtype=torch.int32),
        torch.tensor([IDS], dtype=torch.uint8),
        [torch.tensor(IDS)],
        [np.int64(i) for i in IDS],
        {"input_ids": IDS},
        {"input_ids": [IDS], "attention_mask": [[1, 1, 1, 1]]},
        hf.BatchEncoding({"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 4)}),
        hf.BatchEncoding({"input_ids": np.array(IDS)}),
    ],
    ids=lambda given: type(given).__name__,
)
def test_ids_in_every_form_are_explained_and_continued(given) -> None:
    model = own()
    assert token_ids(given).tolist() == [IDS] and token_ids(given).dtype == torch.int64
    assert engram.explain(model, given, losses=False).ids == IDS
    assert generate(model, given, 3).shape == (1, 7)


def test_padding_of_a_single_text_is_left_out_by_explain_and_refused_by_generate() -> None:
    given = {"input_ids": [[0, 0, *IDS]], "attention_mask": [[0, 0, 1, 1, 1, 1]]}
    assert engram.explain(own(), given, losses=False).ids == IDS
    with pytest.raises(ValueError, match="prompts are padded"):
        generate(own(), given, 3)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 5\], input_ids \[1, 6\]"):
        engram.explain(own(), {**given, "attention_mask": [[1] * 5]})


def test_what_a_chat_template_gives_is_explained() -> None:
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer("<a>"))
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = build("llama")
    engram.attach(model, CONFIG, fast)
    messages = [{"role": "user", "content": "end"}]
    for options in ({}, {"return_dict": True}, {"return_dict": False}, {"return_dict": True, "return_tensors": "pt"}):
        given = fast.apply_chat_template(messages, tokenize=True, **options)
        assert engram.explain(model, given, fast, losses=False).tokens == ["end"]
    assert engram.explain(model, fast(["end"]), fast, losses=False).tokens == ["end"]


@pytest.mark.parametrize(
    "given, error, said",
    [
        ([1.0, 2.0], TypeError, "integers, not float64"),
        (torch.tensor([1.5]), TypeError, "integers, not torch.float32"),
        ([True, False], TypeError, "integers, not bool"),
        (["a", "b"], TypeError, "integers, not <U1"),
        (None, TypeError, "integers, not object"),
        ([[1, 2], [3]], ValueError, "all sequences of one length"),
        (7, ValueError, r"not of shape \[\]"),
        ([[[1]]], ValueError, r"not of shape \[1, 1, 1\]"),
        ({"labels": [1]}, ValueError, "a mapping with input_ids, not with labels"),
        ([[1, 2], [3, 4]], ValueError, r"one text of at least one token, not ids of shape \[2, 2\]"),
        ({"input_ids": [[1, 2], [3, 4]]}, ValueError, r"not ids of shape \[2, 2\]"),
        ({"input_ids": []}, ValueError, r"shape \[1, 0\]"),
    ],
)
def test_what_is_not_ids_of_one_text_is_refused_by_name(given, error, said: str) -> None:
    with pytest.raises(error, match=said):
        engram.explain(own(), given)
    if "one text" not in said and "2, 2" not in said:
        with pytest.raises(error):
            generate(own(), given, 2)
