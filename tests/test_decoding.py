"""Decoding state in a cache of transformers: crops, interruptions and its size."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import engram
from engram import EngramConfig, TokenMap
from engram.memory.cache import MemoryCache
from tests.hf_models import CACHE, VOCAB, build, text

FULL = EngramConfig(
    layers=(0, 2), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101, table_init="normal", conv_init="uniform"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def attached(name="llama", **changes):
    model = build(name)
    torch.manual_seed(1)
    return model, engram.attach(model, FULL.replace(**changes), TokenMap.identity(VOCAB))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_crop_beyond_the_margin_is_refused_and_the_cache_stays_usable():
    model, _ = attached()
    ids = text(1, 340)
    full, cache = model(ids).logits, hf.DynamicCache(config=model.config)
    for part in (slice(0, 320), slice(320, 321)):
        model(ids[:, part], **{CACHE: cache})
    with pytest.raises(ValueError, match=r"removes 257 of 321 positions.*undo at most 256"):
        cache.crop(-257)
    close(model(ids[:, 321:330], **{CACHE: cache}).logits, full[:, 321:330])
    cache.crop(-256)
    close(model(ids[:, 74:], **{CACHE: cache}).logits, full[:, 74:])
    cache.crop(-340)
    close(model(ids, **{CACHE: cache}).logits, full)


@pytest.mark.parametrize("removed", [1, 256, 257, 599])
@torch.no_grad()
def test_every_position_of_the_latest_pass_can_be_cropped(removed):
    model, _ = attached()
    ids, cache = text(1, 640), hf.DynamicCache(config=model.config)
    model(ids[:, :10], **{CACHE: cache})
    model(torch.cat([ids[:, 10 : 610 - removed], text(1, removed, seed=5)], 1), **{CACHE: cache})
    cache.crop(-removed)
    logits = model(ids[:, 610 - removed : 630 - removed], **{CACHE: cache}).logits
    close(logits, model(ids).logits[:, 610 - removed : 630 - removed])


def test_drafts_longer_than_the_margin_are_undone():
    model, _ = attached()
    model.config.max_position_embeddings = 2048
    ids, crops = text(1, 4).repeat(1, 160), []
    model.config.max_position_embeddings = model.generation_config.max_length = 2000
    kwargs = {"max_length": 2000, "stopping_criteria": [_After(652)], "do_sample": False}
    original = hf.DynamicCache.crop
    hf.DynamicCache.crop = lambda self, n: crops.append(n) or original(self, n)
    try:
        drafted = model.generate(ids, prompt_lookup_num_tokens=300, **kwargs)
    finally:
        hf.DynamicCache.crop = original
    assert torch.equal(drafted[:, :652], model.generate(ids, **kwargs)[:, :652]) and min(crops) < -256


class _After(hf.StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("kernel", [0, 4])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("ends", [KeyboardInterrupt, RuntimeError])
@torch.no_grad()
def test_a_cache_whose_forward_pass_was_interrupted_is_refused(ends, layer, kernel):
    model, _ = attached(conv_kernel=kernel)
    ids, cache = text(), hf.DynamicCache(config=model.config)
    full = model(ids).logits
    model(ids[:, :6], **{CACHE: cache})
    fork = copy.deepcopy(cache)

    def stop(*args):
        raise ends("in the middle")

    handle = model.model.layers[layer].register_forward_hook(stop)
    with pytest.raises(ends):
        model(ids[:, 6:9], **{CACHE: cache})
    handle.remove()
    for change in (lambda: None, lambda: cache.crop(-3), lambda: cache.reorder_cache(torch.tensor([1, 0]))):
        change()
        with pytest.raises(ValueError, match=r"a forward pass .*was interrupted"):
            model(ids[:, 6:9], **{CACHE: cache})
    close(model(ids[:, 6:], **{CACHE: fork}).logits, full[:, 6:])
    cache.reset()
    close(model(ids, **{CACHE: cache}).logits, full)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.crop(-2),
    ],
)
@torch.no_grad()
def test_a_change_of_a_cache_that_was_interrupted_is_refused(change, monkeypatch):
    model, _ = attached()
    ids, cache = text(), hf.DynamicCache(config=model.config)
    model(ids[:, :6], **{CACHE: cache})

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MemoryCache, "select", stop)
        patch.setattr(MemoryCache, "rewind", stop)
        change(cache)
    with pytest.raises(ValueError, match="a change of it was interrupted"):
        model(ids[:, 6:], **{CACHE: cache})


@torch.no_grad()
def test_a_pass_that_is_refused_leaves_the_cache_as_it_was():
    model, _ = attached()
    ids, cache = text(), hf.DynamicCache(config=model.config)
    full = model(ids).logits
    model(ids[:, :6], **{CACHE: cache})
    with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids[:, 6:]), **{CACHE: cache})
    with pytest.raises(IndexError):
        model(ids[:, 6:] + 1000, **{CACHE: cache})
    close(model(ids[:, 6:], **{CACHE: cache}).logits, full[:, 6:])


@pytest.mark.parametrize("pieces", [5, 7, 300])
@torch.no_grad()
def test_the_state_of_a_sliding_window_model_does_not_grow(pieces):
    model, _ = attached("mistral")
    cache, sizes = hf.DynamicCache(config=model.config), []
    for step in range(max(3, 700 // pieces)):
        model(text(1, pieces, seed=step), **{CACHE: cache})
        sizes.append(cache.engram.nbytes)
    kept = 2 * (max(pieces, 256) + 9)
    assert cache.engram.length == cache.get_seq_length() == len(sizes) * pieces
    assert max(sizes) <= kept * (2 * 8 + 2 * 32 * 4)
