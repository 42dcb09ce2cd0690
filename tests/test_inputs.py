"""Every form in which transformers passes the padding, the starts of documents and the cache."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import engram
from engram import EngramConfig, TokenMap
from tests.hf_models import CACHE, VOCAB, build, text

FULL = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101)
FULL = FULL.replace(table_init="normal", conv_init="uniform")
IDENTITY = TokenMap.identity(VOCAB)


def attached(name: str) -> tuple[hf.PreTrainedModel, engram.EngramMemory]:
    model = build(name)
    torch.manual_seed(1)
    return model, engram.attach(model, FULL, IDENTITY)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


PAD = torch.tensor([3, 0])  # positions of padding before each text of a batch of two


def left_padded(ids):
    """Return ids whose first positions are an ordinary token, and the mask and position ids that mark the padding."""
    mask = torch.arange(ids.shape[1]) >= PAD[:, None]
    return torch.where(mask, ids, 9), mask, (mask.cumsum(1) - 1).clamp(min=0)


def finished(mask, window=None):
    """Return bool [B, 1, T, T]: causal, without the keys that are padding, and of the last `window` only."""
    time = mask.shape[1]
    seen = torch.ones(time, time).tril().bool()
    if window is not None:
        seen &= ~torch.ones(time, time).tril(-window).bool()
    return seen & mask[:, None, None, :]


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


FORMS = {
    "int": lambda mask: mask.long(),
    "int32": lambda mask: mask.int(),
    "bool": lambda mask: mask,
    "float": lambda mask: mask.float(),
    "finished bool": finished,
    "finished additive": lambda mask: additive(finished(mask)),
}
BY_KIND = {
    "by kind, bool": lambda mask: {"full_attention": finished(mask), "sliding_attention": finished(mask, 8)},
    "by kind, sliding first": lambda mask: {"sliding_attention": finished(mask, 8), "full_attention": finished(mask)},
    "by kind, additive": lambda mask: {
        "full_attention": additive(finished(mask)),
        "sliding_attention": additive(finished(mask, 8)),
    },
}
CASES = [("llama", form) for form in FORMS] + [("gemma3", form) for form in [*list(FORMS)[:4], *BY_KIND]]


@pytest.mark.parametrize(("name", "form"), CASES)
@torch.no_grad()
def test_with_every_form_of_padding_mask_each_text_gives_what_it_gives_alone(name, form):
    model, memory = attached(name)
    seen, recall = [], memory.recall
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    ids, mask, places = left_padded(text())
    alone = [model(ids[i : i + 1, pad:], use_cache=False).logits[0] for i, pad in enumerate(PAD.tolist())]
    given = (FORMS | BY_KIND)[form](mask)
    logits = model(ids, attention_mask=given, position_ids=places, use_cache=False).logits
    assert torch.equal(seen[-1].dead, ~mask)
    for i, pad in enumerate(PAD.tolist()):
        assert torch.equal(seen[-1].row_ids[0][i, pad:], seen[i].row_ids[0][0])
        close(logits[i, pad:], alone[i])


PACKED = [5, 4, 3]


def packed(how, time=12):
    """Return arguments that mark the positions as documents of the lengths PACKED."""
    numbers = torch.repeat_interleave(torch.arange(len(PACKED)), torch.tensor(PACKED))
    places = torch.cat([torch.arange(n) for n in PACKED])[None]
    ends = torch.tensor([0, *PACKED]).cumsum(0).to(torch.int32)
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(PACKED), "max_length_k": max(PACKED)}
    blocks = ((numbers[:, None] == numbers) & torch.ones(time, time).tril().bool())[None, None]
    return {
        "position ids": {"position_ids": places},
        "flash attention": {"position_ids": places, **flash},
        "flash attention alone": {"position_ids": torch.arange(time)[None], **flash},
        "blocks": {"attention_mask": blocks, "position_ids": places},
        "additive blocks": {"attention_mask": additive(blocks), "position_ids": places},
        "blocks alone": {"attention_mask": blocks},
    }[how]


@pytest.mark.parametrize(
    "how", ["position ids", "flash attention", "flash attention alone", "blocks", "additive blocks", "blocks alone"]
)
@torch.no_grad()
def test_with_every_form_of_packing_each_document_gives_what_it_gives_alone(how):
    model, memory = attached("llama")
    seen, recall = [], memory.recall
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    ids = text(1)
    model(ids, use_cache=False, **packed(how))
    for piece, rows in zip(ids.split(PACKED, 1), seen[0].row_ids[0].split(PACKED, 1), strict=True):
        assert torch.equal(rows, recall(piece).row_ids[0])


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_every_kind_of_cache_decodes_as_without_a_cache(name, kind):
    model, _ = attached(name)
    ids = text(time=20)
    full = model(ids, use_cache=False).logits
    caches = {
        "dynamic": lambda: hf.DynamicCache(),
        "sliding": lambda: hf.DynamicCache(config=model.config),
        "static": lambda: hf.StaticCache(config=model.config, max_cache_len=24),
        "offloaded": lambda: hf.DynamicCache(config=model.config, offloading=True),
        "offloaded_static": lambda: hf.StaticCache(config=model.config, max_cache_len=24, offloading=True),
    }
    if kind.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("a cache is offloaded from a device")
    cache = caches[kind]()
    pieces = [model(piece, **{CACHE: cache}).logits for piece in ids.split([7, 1, 1, 1, 10], 1)]
    close(torch.cat(pieces, 1), full)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
@torch.no_grad()
def test_a_quantised_cache_is_followed(name):
    model, memory = attached(name)
    seen, recall = [], memory.recall
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    ids = text(time=20)
    full = model(ids, use_cache=False).logits
    cache = hf.QuantizedCache("fp8", model.config)
    pieces = [model(piece, **{CACHE: cache}).logits for piece in ids.split([7, 1, 1, 1, 10], 1)]
    for layer in FULL.layers:
        assert torch.equal(torch.cat([r.row_ids[layer] for r in seen[1:]], 1), seen[0].row_ids[layer])
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=0.05)  # float8 keys and values


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_of_torch_changes_nothing(dtype):
    model, memory = attached("llama")
    ids, mask, places = left_padded(text())
    more = {"attention_mask": mask.long(), "position_ids": places}
    logits = model(ids, **more).logits
    loss_of(model.train(), ids).backward()
    gradient = memory.gradients[0][0][1]
    memory.gradients[0].clear(), memory.gradients[2].clear()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model.eval()(ids, **more).logits, logits)
        assert torch.equal(model.generate(ids[:, :6], max_new_tokens=3, do_sample=False)[:, :6], ids[:, :6])
        loss_of(model.train(), ids).backward()
        assert torch.equal(memory.gradients[0][0][1], gradient)
        memory.detach()
        torch.manual_seed(1)
        fresh = engram.EngramMemory(FULL, IDENTITY, 32)
        engram.attach(model, fresh)
        assert {w.dtype for n, w in fresh.named_parameters() if not n.endswith("_norm")} == {torch.float32}
        assert model(ids, **more).logits.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_the_default_device_of_torch_changes_nothing():
    """The device meta, on which nothing can be computed, stands for a device other than the model's."""
    model, _ = attached("llama")
    ids, mask, places = left_padded(text())
    cases = [
        {"attention_mask": mask.long(), "position_ids": places},
        {"position_ids": packed("position ids")["position_ids"]},
    ]
    cases += [packed("blocks")]
    for more in cases:
        logits = model(ids, use_cache=False, **more).logits
        with torch.device("meta"):
            assert torch.equal(model(ids, use_cache=False, **more).logits, logits)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(2, 11), ValueError, r"attention_mask has shape \(2, 11\)"),
        (torch.ones(2, 12, 12), ValueError, r"attention_mask has shape \(2, 12, 12\)"),
        (torch.ones(3, 12), ValueError, r"attention_mask has shape \(3, 12\)"),
        (torch.ones(2, 1, 11, 12), ValueError, r"attention_mask has shape \(2, 1, 11, 12\)"),
        ([[1] * 12] * 2, TypeError, "attention_mask is list"),
        ({}, ValueError, "attention_mask is an empty dict"),
    ],
)
@torch.no_grad()
def test_a_mask_that_does_not_fit_the_ids_is_refused_by_name(mask, error, match):
    model, _ = attached("gemma3")
    with pytest.raises(error, match=match):
        model(text(), attention_mask=mask)
