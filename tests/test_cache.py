"""Decoding state: as if everything were kept, in buffers that do not grow."""

from __future__ import annotations

import copy
import pickle
import random
from contextlib import nullcontext

import pytest
import torch

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig
from engram.lm.transformer import Cache
from engram.memory.cache import MemoryCache
from engram.memory.recall import Recall

VOCAB, WIDTH = 50, 16
SMALL = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, head_dim=4, rows_per_head=211, conv_init="uniform")


def make(**changes) -> EngramMemory:
    torch.manual_seed(0)
    memory = EngramMemory(SMALL.replace(**changes), TokenMap.identity(VOCAB), WIDTH).eval()
    for table in memory.tables.values():
        table.write(torch.arange(table.rows), torch.randn(table.rows, table.dim))
    return memory


class Everything:
    """The slow twin: all ids, document numbers, dead positions and convolution inputs of a text since its start."""

    def __init__(self, memory: EngramMemory, sequences: int):
        self.memory = memory
        self.ids = self.runs = torch.zeros(sequences, 0, dtype=torch.int64)
        self.dead = self.ids.bool()
        self.conv: dict[int, torch.Tensor] = {}

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def select(self, sequences):
        self.ids, self.runs, self.dead = self.ids[sequences], self.runs[sequences], self.dead[sequences]
        self.conv = {layer: x[sequences] for layer, x in self.conv.items()}

    def rewind(self, positions):
        keep = self.length - positions
        self.ids, self.runs, self.dead = self.ids[:, :keep], self.runs[:, :keep], self.dead[:, :keep]
        self.conv = {layer: x[:, :keep] for layer, x in self.conv.items()}

    @torch.no_grad()
    def step(self, ids, hidden, documents, dead):
        """({layer: row ids}, {layer: update}) of a piece."""
        start, runs = self.length, torch.zeros_like(ids)
        if documents is not None:
            runs[:, 1:] = (documents[:, 1:] != documents[:, :-1]).cumsum(1)
        if dead is not None:
            runs = runs + dead.cumsum(1)
        runs = runs + (self.runs[:, -1:] if start else 0)
        dead = torch.zeros_like(ids, dtype=torch.bool) if dead is None else dead
        ids = ids.masked_fill(dead, self.memory.config.pad_id)
        self.ids, self.runs, self.dead = (
            torch.cat(pair, 1) for pair in ((self.ids, ids), (self.runs, runs), (self.dead, dead))
        )
        row_ids = {k: v[:, start:] for k, v in self.memory.hasher(self.ids, documents=self.runs).items()}
        updates = {}
        for layer, table in self.memory.tables.items():
            rows, before = table.gather(row_ids[layer]).flatten(2), self.conv.get(layer)
            here = self.dead[:, start:] if bool(self.dead[:, start:].any()) else None
            updates[layer], inputs = self.memory.fusions[str(layer)](rows, hidden, self.runs, before, here)
            if inputs is not None:
                self.conv[layer] = inputs if before is None else torch.cat([before, inputs], 1)
        return row_ids, updates


def decode(memory, cache, ids, hidden, documents=None, dead=None):
    recall = memory.recall(ids, documents, cache=cache, dead=dead)
    return recall, {layer: memory[layer](hidden, recall) for layer in memory.config.layers}


def bounded(memory, cache, sequences, largest):
    """Return True if the buffers hold no more than twice what can be read, whatever was decoded."""
    kept = 2 * max(largest, max(memory.config.orders[-1] - 1, memory.lag) + cache.margin)
    layers = len(memory.config.layers) if memory.config.conv_kernel else 0
    return cache.nbytes <= sequences * kept * (16 + layers * WIDTH * 4)


MODES = [nullcontext, torch.no_grad, torch.inference_mode]
CASES = [
    ({}, torch.float32, 256),
    ({}, torch.bfloat16, 20),
    ({"conv_kernel": 0}, torch.float32, 20),
    ({"conv_kernel": 1}, torch.float32, 5),
    ({"boundary": "dead"}, torch.float32, 20),
    ({"boundary": "eos", "orders": (2, 4), "conv_dilation": 5}, torch.float32, 0),
    ({"orders": (2,), "conv_kernel": 2, "conv_dilation": 1}, torch.bfloat16, 40),
]


@pytest.mark.parametrize("changes, dtype, margin", CASES)
def test_random_pieces_rewinds_beams_and_forks_read_what_a_text_kept_whole_reads(changes, dtype, margin):
    memory, draw = make(**changes), random.Random(str(changes))
    memory.fusions.to(dtype)
    sequences, cache, twin = 2, MemoryCache(rewind=margin), Everything(memory, 2)
    possible, longest = 0, 0  # positions that can be rewound
    for _ in range(220):
        act = draw.random()
        if act < 0.25 and possible:
            back = possible if draw.random() < 0.2 else draw.randint(0, min(possible, 30))  # exactly the margin, too
            cache.rewind(back)
            twin.rewind(back)
            possible -= back
        elif act < 0.35 and twin.length:
            chosen = torch.tensor([draw.randrange(sequences) for _ in range(draw.randint(1, 3))])
            cache.select(chosen)
            twin.select(chosen)
            sequences = len(chosen)
        elif act < 0.45:
            way = draw.choice([copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
            if not any(tail.buffer.requires_grad for tail in cache._state.conv.values()) or way is copy.copy:
                other, cache = cache, way(cache)
                with torch.no_grad():  # what becomes of the one must not reach the other
                    decode(memory, other, torch.full((sequences, 3), 7), torch.ones(sequences, 3, WIDTH, dtype=dtype))
        time = draw.choice([1, 1, 1, 2, draw.randint(0, 12), draw.randint(30, 90)])
        longest = max(longest, time)
        ids = torch.randint(0, VOCAB, (sequences, time))
        hidden = torch.randn(sequences, time, WIDTH).to(dtype)
        documents = dead = None
        if draw.random() < 0.3:
            documents = torch.randint(0, 2, (sequences, time)).cumsum(1)
        if draw.random() < 0.3:
            dead = torch.rand(sequences, time) < 0.2
        with draw.choice(MODES)():
            recall, found = decode(memory, cache, ids, hidden, documents, dead)
        row_ids, wanted = twin.step(ids, hidden, documents, dead)
        for layer in memory.config.layers:
            live = ~twin.dead[:, twin.length - time :]
            assert torch.equal(recall.row_ids[layer][live], row_ids[layer][live])
            assert torch.equal(found[layer].detach(), wanted[layer])
        possible = min(margin, possible + time)
        assert cache.length == twin.length and bounded(memory, cache, sequences, longest)
    assert cache.length > 1000


def test_a_long_text_in_single_steps_reads_what_one_pass_reads():
    memory, cache = make(), MemoryCache(rewind=8)
    ids, hidden = torch.randint(0, VOCAB, (1, 1200)), torch.randn(1, 1200, WIDTH)
    with torch.inference_mode():
        recall, whole = decode(memory, None, ids, hidden)
        sizes = set()
        for t in range(1200):
            step, found = decode(memory, cache, ids[:, t : t + 1], hidden[:, t : t + 1])
            for layer in memory.config.layers:
                assert torch.equal(step.row_ids[layer], recall.row_ids[layer][:, t : t + 1])
                torch.testing.assert_close(found[layer], whole[layer][:, t : t + 1])
            sizes.add(cache.nbytes if t > 100 else None)
    assert cache.length == 1200 and sizes == {None, cache.nbytes}


@pytest.mark.parametrize("margin", [0, 1, 10, 256])
def test_a_rewind_beyond_the_margin_is_refused_and_changes_nothing(margin):
    memory, cache = make(), MemoryCache(rewind=margin)
    ids, hidden = torch.randint(0, VOCAB, (1, 600)), torch.randn(1, 600, WIDTH)
    with torch.no_grad():
        decode(memory, cache, ids[:, :500], hidden[:, :500])
        with pytest.raises(
            ValueError, match=rf"cannot rewind {margin + 1} positions.* {margin} .*rewind={margin + 1}\)"
        ):
            cache.rewind(margin + 1)
        assert cache.length == 500
        cache.rewind(margin)
        if margin:
            with pytest.raises(ValueError, match=rf"cannot rewind 2 positions.* 0 needs.*rewind={margin + 2}\)"):
                cache.rewind(2)
        start = 500 - margin
        _, found = decode(memory, cache, ids[:, start:], hidden[:, start:])
        _, whole = decode(memory, None, ids, hidden)
    torch.testing.assert_close(found[2], whole[2][:, start:])
    cache.rewind(cache.length)  # the start of a text needs nothing that was kept
    assert cache.length == 0 and cache.ids is None


def test_a_margin_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="0 or more, not -1"):
        MemoryCache(rewind=-1)
    assert MemoryCache().margin == 256


def test_a_large_piece_can_be_used_again_and_the_text_goes_on():
    memory, cache = make(), MemoryCache(rewind=4)
    ids, hidden = torch.randint(0, VOCAB, (1, 260)), torch.randn(1, 260, WIDTH)
    with torch.no_grad():
        _, whole = decode(memory, None, ids, hidden)
        start = 0
        for length in (20, 200, 40):
            part = slice(start, start + length)
            recall = memory.recall(ids[:, part], cache=cache)
            for _ in range(3):
                for layer in memory.config.layers:
                    torch.testing.assert_close(memory[layer](hidden[:, part], recall), whole[layer][:, part])
            start += length


def test_recalls_made_well_ahead_find_the_inputs_before_them():
    memory, cache = make(), MemoryCache(rewind=2)
    ids, hidden = torch.randint(0, VOCAB, (2, 600)), torch.randn(2, 600, WIDTH)
    _, whole = decode(memory, None, ids, hidden)
    recalls = [memory.recall(piece, cache=cache) for piece in ids.split(150, 1)]
    for recall, h, wanted in zip(recalls, hidden.split(150, 1), whole[0].split(150, 1), strict=True):
        torch.testing.assert_close(memory[0](h, recall), wanted)


def test_recalls_whose_positions_were_taken_back_are_refused():
    memory, cache, hidden = make(), MemoryCache(), torch.randn(2, 6, WIDTH)
    ids = torch.randint(0, VOCAB, (2, 6))
    decode(memory, cache, ids, hidden)
    late = memory.recall(ids, cache=cache)
    cache.rewind(8)
    with pytest.raises(RuntimeError, match="layer 0 has computed 4 of the 6 positions"):
        memory[0](hidden, late)
    decode(memory, cache, ids, hidden)
    with pytest.raises(RuntimeError, match="does not belong to the text"):
        memory[0](hidden, late)
    last = memory.recall(ids, cache=cache)
    cache.select(torch.tensor([1, 0]))
    with pytest.raises(RuntimeError, match="does not belong to the text"):
        memory[0](hidden, last)


def test_gradients_reach_earlier_pieces_through_the_convolution():
    memory = make()
    ids, hidden = torch.randint(0, VOCAB, (1, 30)), torch.randn(1, 30, WIDTH)
    gradients = []
    for pieces in ([30], [10, 1, 1, 18], [29, 1]):
        given, cache, start, found = hidden.clone().requires_grad_(), MemoryCache(rewind=0), 0, []
        for length in pieces:
            part = slice(start, start + length)
            found.append(decode(memory, cache, ids[:, part], given[:, part])[1][2])
            start += length
        torch.cat(found, 1).square().sum().backward()
        gradients.append(given.grad)
    assert gradients[0].any()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_step_in_a_wider_type_is_not_rounded_to_the_one_before():
    memory, ids = make(), torch.randint(0, VOCAB, (1, 12))
    hidden = torch.randn(1, 12, WIDTH)
    cache, twin = MemoryCache(), Everything(memory, 1)
    with torch.no_grad():
        for t in range(12):
            memory.fusions.to(torch.bfloat16 if t % 4 < 2 else torch.float32)
            h = hidden[:, t : t + 1].to(next(memory.fusions.parameters()).dtype)
            _, found = decode(memory, cache, ids[:, t : t + 1], h)
            assert torch.equal(found[2], twin.step(ids[:, t : t + 1], h, None, None)[1][2])


# --- what ends in the middle ---


@pytest.mark.parametrize("ends", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("where", ["hashing", "fetching", "reading", "keeping"])
def test_a_piece_that_was_interrupted_can_be_repeated_or_is_refused(ends, where, monkeypatch):
    memory, cache, ids = make(), MemoryCache(), torch.randint(0, VOCAB, (1, 20))
    hidden = torch.randn(1, 20, WIDTH)
    _, whole = decode(memory, None, ids, hidden)
    decode(memory, cache, ids[:, :10], hidden[:, :10])

    def end(*args, **kwargs):
        raise ends("in the middle")

    with monkeypatch.context() as patch, pytest.raises(ends):
        if where == "hashing":
            patch.setattr(type(memory.hasher), "__call__", end)
        elif where == "fetching":
            patch.setattr(type(memory.tables[0]), "gather", end)
        elif where == "reading":
            patch.setattr(Recall, "rows", end)
        else:
            patch.setattr(MemoryCache, "keep_inputs", end)
        decode(memory, cache, ids[:, 10:], hidden[:, 10:])
    if where in ("hashing", "fetching"):  # nothing has happened yet
        assert cache.length == 10
    else:
        with pytest.raises(RuntimeError, match="layer 0 has computed 10 of the 20 positions"):
            decode(memory, cache, ids[:, 10:], hidden[:, 10:])
        cache.rewind(cache.length - 10)
    _, found = decode(memory, cache, ids[:, 10:], hidden[:, 10:])
    torch.testing.assert_close(found[2], whole[2][:, 10:])


@pytest.mark.parametrize("kernel", [0, 4])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_transformers_pass_that_broke_off_is_noticed_and_taken_back(kernel, block):
    memory, ids = make(conv_kernel=kernel), torch.randint(0, VOCAB, (1, 24))
    model = Transformer(TransformerConfig(VOCAB, hidden_size=WIDTH, layers=3, heads=2), memory).eval()
    cache = Cache()

    def stop(*args):
        raise KeyboardInterrupt

    with torch.no_grad():
        full = model(ids)
        for start in (0, 8, 16):
            handle = model.blocks[block].ffn.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, start : start + 8], cache=cache)
            handle.remove()
            with pytest.raises(RuntimeError, match=f"this cache is at position {start}, its memory at {start + 8}"):
                model(ids[:, start : start + 8], cache=cache)
            cache.rewind(0)
            found = model(ids[:, start : start + 8], cache=cache)
            torch.testing.assert_close(found, full[:, start : start + 8], rtol=1e-4, atol=1e-5)


def test_a_recall_for_other_positions_than_the_caches_is_refused():
    memory, ids = make(conv_kernel=0), torch.randint(0, VOCAB, (1, 24))
    model = Transformer(TransformerConfig(VOCAB, hidden_size=WIDTH, layers=3, heads=2), memory).eval()
    with torch.no_grad():
        full, cache = model(ids), Cache()
        model(ids[:, :8], cache=cache, recall=memory.recall(ids[:, :8]))  # the cache's memory has seen nothing
        with pytest.raises(RuntimeError, match="at position 8, its memory at 0"):
            model(ids[:, 8:], cache=cache)
        cache = Cache()
        recalls = [memory.recall(piece, cache=cache.memory) for piece in ids.split(8, 1)]
        for recall in (recalls[1], None):
            with pytest.raises(RuntimeError, match=r"at position 0, its memory at (8|24)"):
                model(ids[:, :8], cache=cache, recall=recall)
        steps = [model(p, cache=cache, recall=r) for p, r in zip(ids.split(8, 1), recalls, strict=True)]
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)


def test_copies_of_a_transformers_cache_go_on_apart():
    memory, ids, other = make(), torch.randint(0, VOCAB, (1, 24)), torch.randint(0, VOCAB, (1, 24))
    model = Transformer(TransformerConfig(VOCAB, hidden_size=WIDTH, layers=3, heads=2), memory).eval()
    with torch.no_grad():
        full = model(ids)
        for way in (copy.copy, copy.deepcopy):
            cache = Cache()
            model(ids[:, :12], cache=cache)
            fork = way(cache)
            for t in range(12, 24):
                model(other[:, t : t + 1], cache=fork)
                found = model(ids[:, t : t + 1], cache=cache)
                torch.testing.assert_close(found, full[:, t : t + 1], rtol=1e-4, atol=1e-5)
