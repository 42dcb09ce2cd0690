"""EngramMemory in a backbone: step 0, decoding, packing, gradients, state dicts."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_hash import row_ids

import engram.memory.build
from engram import EngramConfig, EngramMemory, HashLayout, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.lm.transformer import Cache
from engram.memory.recall import MemoryCache
from engram.tables import HostTable

VOCAB = 50
SMALL = EngramConfig(layers=(1, 2), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101, table_init="normal")
SHAPE = TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=3, heads=2, max_length=64)


def make(config: EngramConfig | None = SMALL, shape: TransformerConfig = SHAPE, folder=None) -> Transformer:
    torch.manual_seed(1)
    memory = (
        None if config is None else EngramMemory(config, TokenMap.identity(VOCAB), shape.hidden_size, folder=folder)
    )
    torch.manual_seed(0)
    return Transformer(shape, memory)


def text(B: int = 2, T: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ffn", ["swiglu", "relu2"])
@pytest.mark.parametrize("inject", ["residual", "values"])
def test_with_zero_rows_step_0_logits_equal_the_plain_models(ffn, inject):
    shape = TransformerConfig(**{**vars(SHAPE), "ffn": ffn})
    plain, memory = make(None, shape), make(SMALL.replace(table_init="zero", inject=inject, conv_init="uniform"), shape)
    assert torch.equal(plain(text()), memory(text()))
    assert not torch.equal(plain(text()), make(SMALL.replace(inject=inject), shape)(text()))


def test_a_bfloat16_model_reads_float32_rows():
    model = make(SMALL.replace(conv_init="uniform"))
    full = model(text())
    half = model.to(torch.bfloat16)(text())
    assert half.dtype == torch.bfloat16 and model.memory.tables[1].dtype == torch.float32
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_logits_never_depend_on_later_tokens():
    model = make(SMALL.replace(conv_init="uniform"))
    ids, other = text(), text()
    other[:, 12:] = text(seed=5)[:, 12:]
    torch.testing.assert_close(model(ids)[:, :12], model(other)[:, :12])


@pytest.mark.parametrize("inject", ["residual", "values"])
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [5, 1, 1, 9, 4]])
def test_cached_decoding_equals_the_full_forward(inject, pieces):
    model = make(SMALL.replace(conv_init="uniform", inject=inject)).eval()
    ids, cache = text(), Cache()
    with torch.no_grad():
        full = model(ids)
        steps = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-5)


def test_rejected_draft_tokens_leave_no_trace_in_the_cache():
    model = make(SMALL.replace(conv_init="uniform")).eval()
    ids, drafts, cache = text(), text(seed=9), Cache()
    with torch.no_grad():
        full = model(ids)
        model(ids[:, :10], cache=cache)
        model(drafts[:, :4], cache=cache)
        cache.rewind(4)
        rest = model(ids[:, 10:], cache=cache)
    torch.testing.assert_close(rest, full[:, 10:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot rewind 21 positions of 20"):
        cache.rewind(21)


def test_placeholder_ids_after_speculative_decoding_are_refused():
    with pytest.raises(ValueError, match="-1"):
        make().memory.recall(torch.tensor([[3, -1]]))


def test_a_packed_batch_gives_each_document_the_memory_it_has_alone():
    model = make(SMALL.replace(conv_init="uniform"))
    ids, hidden = text(), torch.randn(2, 20, 32)
    documents = torch.tensor([[4] * 8 + [7] * 12] * 2)
    packed = model.memory.recall(ids, documents)
    for part in (slice(0, 8), slice(8, 20)):
        alone = model.memory.recall(ids[:, part])
        for layer in SMALL.layers:
            assert torch.equal(packed.row_ids[layer][:, part], alone.row_ids[layer])
            update = model.memory[layer](hidden, packed)[:, part]
            torch.testing.assert_close(update, model.memory[layer](hidden[:, part], alone))


def test_dead_positions_end_ngrams_get_nothing_and_may_have_any_id():
    model = make(SMALL.replace(conv_init="uniform"))
    ids, hidden = text(), torch.randn(2, 20, 32)
    dead = torch.zeros(2, 20, dtype=torch.bool)
    dead[:, 7:9] = True
    recall = model.memory.recall(ids.masked_fill(dead, 999), dead=dead)
    update = model.memory[1](hidden, recall)
    assert not update[:, 7:9].any() and update[:, 9].any()
    for part in (slice(0, 7), slice(9, 20)):
        alone = model.memory.recall(ids[:, part])
        assert torch.equal(recall.row_ids[1][:, part], alone.row_ids[1])
        torch.testing.assert_close(update[:, part], model.memory[1](hidden[:, part], alone))


def test_dead_positions_lie_within_the_documents_of_a_packed_batch():
    memory, ids = make().memory, text()
    documents = torch.tensor([[0] * 8 + [1] * 12] * 2)
    dead = torch.zeros(2, 20, dtype=torch.bool).index_fill(1, torch.tensor([12]), True)
    recall = memory.recall(ids, documents, dead=dead)
    for part in (slice(0, 8), slice(8, 12), slice(13, 20)):
        assert torch.equal(recall.row_ids[2][:, part], memory.recall(ids[:, part]).row_ids[2])


def test_rows_of_dead_positions_get_no_gradient():
    model = make()
    dead = torch.zeros(2, 20, dtype=torch.bool)
    dead[0, :6] = True
    recall = model.memory.recall(text(), dead=dead)
    model.memory[1](torch.randn(2, 20, 32), recall).square().sum().backward()
    [(row_ids, gradient)] = model.memory.gradients[1]
    assert torch.equal(row_ids, recall.row_ids[1][~dead]) and gradient.shape == (34, 4, 8)
    assert gradient.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("pieces", [[1] * 20, [5, 1, 1, 9, 4], [8, 12]])
def test_a_cache_keeps_dead_positions_and_documents(pieces):
    memory = make(SMALL.replace(conv_init="uniform")).memory
    ids, hidden = text(), torch.randn(2, 20, 32)
    dead = torch.zeros(2, 20, dtype=torch.bool)
    dead[0, :3], dead[1, 7:9] = True, True
    whole = memory[1](hidden, memory.recall(ids, dead=dead))
    cache, steps, start = MemoryCache(), [], 0
    for length in pieces:
        part = slice(start, start + length)
        given = dead[:, part] if dead[:, part].any() else None
        steps.append(memory[1](hidden[:, part], memory.recall(ids[:, part], dead=given, cache=cache)))
        start += length
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_documents_within_a_piece_cut_a_cached_text():
    memory = make(SMALL.replace(conv_init="uniform")).memory
    ids, hidden = text(), torch.randn(2, 20, 32)
    documents = torch.tensor([[0] * 13 + [1] * 7] * 2)  # one position before a piece ends: trigrams look over two
    whole = memory[1](hidden, memory.recall(ids, documents))
    cache, steps = MemoryCache(), []
    for part in (slice(0, 8), slice(8, 14), slice(14, 20)):
        recall = memory.recall(ids[:, part], documents[:, part], cache=cache)
        steps.append(memory[1](hidden[:, part], recall))
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_a_cache_continues_with_the_sequences_that_were_selected():
    memory = make(SMALL.replace(conv_init="uniform")).memory
    ids, hidden = text(B=3), torch.randn(3, 20, 32)
    dead = torch.zeros(3, 12, dtype=torch.bool)
    dead[1, 9:11] = True
    chosen, cache = torch.tensor([1, 1, 2, 0]), MemoryCache()
    memory[1](hidden[:, :12], memory.recall(ids[:, :12], dead=dead, cache=cache))
    cache.select(chosen)
    cache.rewind(2)
    rest = memory[1](hidden[chosen, 10:], memory.recall(ids[chosen, 10:], cache=cache))
    dead = torch.nn.functional.pad(dead[:, :10], (0, 10))
    whole = memory[1](hidden, memory.recall(ids, dead=dead))
    torch.testing.assert_close(rest, whole[chosen, 10:])
    with pytest.raises(ValueError, match="holds 4 sequences, these are 3"):
        memory.recall(ids, cache=cache)
    with pytest.raises(ValueError, match="its own look-back"):
        memory.recall(ids[chosen], lookback=ids[chosen, :2], cache=cache)


@pytest.mark.parametrize("rewound", [True, False])
def test_a_cache_without_positions_is_like_a_new_one(rewound):
    memory, ids, hidden = make(SMALL.replace(conv_init="uniform")).memory, text(), torch.randn(2, 20, 32)
    documents = torch.tensor([[0] * 13 + [1] * 7] * 2)
    cache = MemoryCache()
    first = ids if rewound else ids[:, :0]
    memory[1](hidden[:, : first.shape[1]], memory.recall(first, documents[:, : first.shape[1]], cache=cache))
    cache.rewind(cache.length)
    found = memory[1](hidden, memory.recall(ids, documents, cache=cache))
    torch.testing.assert_close(found, memory[1](hidden, memory.recall(ids, documents)))
    memory.recall(ids[:, :0], documents[:, :0], cache=cache)  # an empty piece changes nothing
    assert cache.length == 20 and cache.documents is not None and cache.documents.shape == (2, 20)


def test_a_recall_with_a_cache_may_be_used_again_and_no_piece_may_miss_a_layer():
    memory, ids, hidden = make(SMALL.replace(conv_init="uniform")).memory, text(), torch.randn(2, 20, 32)
    whole, cache = memory[1](hidden, memory.recall(ids)), MemoryCache()
    for part in (slice(0, 8), slice(8, 20)):
        recall = memory.recall(ids[:, part], cache=cache)
        for _ in range(2):
            torch.testing.assert_close(memory[1](hidden[:, part], recall), whole[:, part])
    cache = MemoryCache()
    memory.recall(ids[:, :8], cache=cache)
    with pytest.raises(RuntimeError, match=r"layer 1 has computed 0 of the 8 positions before this piece"):
        memory[1](hidden[:, 8:], memory.recall(ids[:, 8:], cache=cache))


def test_the_pad_id_goes_through_the_token_map():
    table_size = 10
    token_map = TokenMap.identity(table_size)
    shuffled = type(token_map)((token_map.table[::-1]).copy())
    memory = EngramMemory(SMALL.replace(pad_id=0), shuffled, 32)
    assert memory.layout.pad_id == shuffled.table[0] == 9


def test_a_layout_that_needs_more_rows_than_the_table_has_raises():
    memory = make().memory
    memory.tables[1] = HostTable(100, 8)
    with pytest.raises(IndexError, match="outside this table of 100 rows: the hash layout does not belong"):
        memory.recall(text())


def test_a_missing_table_stops_the_program():
    model = make()
    model.memory.tables[2].close()
    with pytest.raises(ValueError, match="is closed"):
        model(text())


def test_only_the_rows_of_the_step_change():
    model = make()
    optimizer = build_optimizer(model, table_lr=0.1)
    before = {layer: table.gather(torch.arange(table.rows)).clone() for layer, table in model.memory.tables.items()}
    recall = model.memory.recall(text())
    loss = model(text()).logsumexp(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for layer, table in model.memory.tables.items():
        changed = (table.gather(torch.arange(table.rows)) != before[layer]).any(dim=1)
        assert set(changed.nonzero().flatten().tolist()) == set(recall.row_ids[layer].flatten().tolist())


def test_row_gradients_equal_those_of_a_dense_embedding():
    model = make()
    ids = text()
    recall = model.memory.recall(ids)
    model.train()
    hidden = torch.randn(2, 20, 32)
    model.memory[1](hidden, recall).square().sum().backward()
    [(row_ids, grad)] = model.memory.gradients[1]
    table = model.memory.tables[1]
    weight = table.gather(torch.arange(table.rows)).clone().requires_grad_()
    rows = torch.nn.functional.embedding(recall.row_ids[1], weight).flatten(2)
    model.memory.fusions["1"](rows, hidden)[0].square().sum().backward()
    summed = torch.zeros_like(weight).index_add_(0, row_ids.flatten(), grad.flatten(0, -2))
    torch.testing.assert_close(summed, weight.grad)


def test_accumulated_gradients_equal_one_large_batch():
    def train(parts: int) -> torch.Tensor:
        model = make()
        optimizer = build_optimizer(model, lr=0.0, table_lr=0.1)
        optimizer.zero_grad()
        for piece in text(B=4).chunk(parts):
            (model(piece).logsumexp(-1).mean() / parts).backward()
        optimizer.step()
        return model.memory.tables[1].tensor.clone()

    torch.testing.assert_close(train(1), train(2), rtol=1e-3, atol=1e-5)


def test_scaled_losses_move_rows_as_unscaled_ones_do_and_infinite_ones_move_none():
    def train(scale: float | None, loss_times: float = 1.0) -> tuple[torch.Tensor, int, float]:
        model = make(SMALL.replace(table_init="zero"))
        optimizer = build_optimizer(model, table_lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(text(seed=step)).logsumexp(-1).mean() * loss_times).backward()
            scaler.step(optimizer)
            scaler.update()
        state = optimizer.row_optimizers[0].state["v"].tensor
        return model.memory.tables[1].tensor.clone(), optimizer.row_optimizers[0].steps, float(state.sum())

    plain, scaled, infinite = train(None), train(2.0**12), train(1.0, float("inf"))
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-4, atol=1e-6)
    assert scaled[2] == pytest.approx(plain[2], rel=1e-4) and scaled[1] == plain[1] == 3
    assert infinite[1] == 0 and not infinite[0].any()


def test_a_scaler_that_cannot_reach_the_rows_is_refused():
    model = make()
    optimizer, scaler = build_optimizer(model), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(text()).logsumexp(-1).mean()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"bf16=True instead of fp16=True, or max_grad_norm=0"):
        scaler.step(optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    model(text()).logsumexp(-1).mean().backward()
    optimizer.step()  # without a scaler, as the message says
    assert optimizer.touched


def test_an_infinite_row_gradient_under_a_scaler_moves_nothing():
    model = make()
    optimizer, scaler = build_optimizer(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaler.scale(model(text()).logsumexp(-1).mean()).backward()
    model.memory.gradients[1][0][1][0, 0, 0] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("kind", ["rms", "adam", "adagrad", "sinkhorn"])
def test_host_memory_stays_host_memory_whatever_the_default_device_is(path, kind, monkeypatch):
    from engram.tables import kernels, reference
    from engram.tables.codecs import PQ
    from engram.tables.optimizers import entries

    if path == "torch":
        monkeypatch.setattr(kernels, "native", None)
    results = []
    for device in ("cpu", "meta"):  # meta in the place of a GPU: what is made there cannot be read
        reference.normal_quantiles.cache_clear()
        entries._scratch.__dict__.clear()
        with torch.device("cpu"):
            half = HostTable(100, 8, torch.bfloat16, init="normal")
            memory, ids = make().memory, [text(seed=step) for step in range(3)]
            optimizer = build_optimizer(memory, table_lr=0.1, table_optimizer=kind)
            grad = torch.randn(2, 20, memory.config.d_mem, generator=torch.Generator().manual_seed(0))
        with torch.device(device):
            documents = (torch.arange(20, device="cpu") // 7).expand(2, 20)
            for step in range(2):
                ahead = memory.recall(ids[step + 1], documents)
                for layer in memory.tables:
                    memory.recall(ids[step], documents).rows(layer).backward(grad)
                optimizer.step()
            rows = [ahead.rows(layer).detach() for layer in memory.tables]
            rows += [table.gather(torch.arange(50, device="cpu")) for table in memory.tables.values()]
            rows += [memory.get_extra_state(), half.gather(ids[0], torch.empty(2, 20, 8, device="cpu"))]
            codec = PQ.train(rows[2], 4)
            rows += [codec.codebooks, codec.decode(codec.encode(rows[2]), 8)]
        results.append(rows)
    assert all(map(torch.equal, *results)) and results[0][0].any()


def test_several_processes_are_refused_before_their_tables_differ(monkeypatch):
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 processes train this memory"):
        model(text()).logsumexp(-1).mean().backward()
    with pytest.raises(RuntimeError, match="2 processes train this memory"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    build_optimizer(make(SMALL.replace(train_tables=False))).step()


def test_no_gradient_is_kept_without_training():
    model = make().eval()
    model(text()).sum().backward()
    with torch.no_grad():
        make().train()(text())
    assert not any(model.memory.gradients.values())


def test_frozen_tables_do_not_move():
    model = make(SMALL.replace(train_tables=False))
    optimizer = build_optimizer(model)
    before = model.memory.tables[1].gather(torch.arange(50)).clone()
    model(text()).logsumexp(-1).mean().backward()
    optimizer.step()
    assert torch.equal(model.memory.tables[1].gather(torch.arange(50)), before)


def test_the_table_sits_in_the_tables_group_with_its_own_learning_rate():
    model = make()
    optimizer = build_optimizer(model, lr=1e-3, table_lr=0.5, weight_decay=0.1)
    group = optimizer.param_groups[-1]
    assert (group["name"], group["lr"], group["weight_decay"], group["params"]) == ("tables", 0.5, 0.0, [])
    dense = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(dense) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    assert not any(word in name for name in decayed for word in ("norm", "conv", "bias"))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    model(text()).logsumexp(-1).mean().backward()
    optimizer.step()
    assert optimizer.row_optimizers[0].lr == 0.25


def test_state_dict_carries_the_rows_and_refuses_another_layout():
    model, other = make(), make(SMALL.replace(layers=(1, 2)))
    model.memory.tables[1].write(torch.tensor([7]), torch.full((1, 8), 3.0))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model(text()), other(text()))
    with pytest.raises(ValueError, match="another hash layout"):
        make(SMALL.replace(seed=3)).load_state_dict(model.state_dict())
    without = {k: v for k, v in model.state_dict().items() if "tables" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*memory\.tables\.1"):
        make().load_state_dict(without)


def test_tables_in_a_folder_train_like_tables_in_memory(tmp_path):
    results = []
    for folder in (None, tmp_path):
        model = make(folder=folder)
        optimizer = build_optimizer(model)
        for step in range(3):
            optimizer.zero_grad()
            model(text(seed=step)).logsumexp(-1).mean().backward()
            optimizer.step()
        results.append(model.memory.tables[2].tensor.clone())
    assert torch.equal(*results)
    assert (tmp_path / "layer-1.rows").exists() and (tmp_path / "layer-2.rows").exists()


def test_a_folder_with_rows_of_another_memory_is_refused(tmp_path):
    model = make(folder=tmp_path)
    model.memory.tables[1].write(torch.tensor([5]), torch.ones(1, 8))
    model.memory.close()
    assert torch.equal(make(folder=tmp_path).memory.tables[1].gather(torch.tensor([5])), torch.ones(1, 8))
    for other in (SMALL.replace(seed=3), SMALL.replace(table_std=0.5), SMALL.replace(table_init="zero")):
        with pytest.raises(ValueError, match="rows of another memory"):
            make(other, folder=tmp_path)
    with pytest.raises(ValueError, match=r"rows of another memory.*token_map"):
        EngramMemory(SMALL, TokenMap(torch.arange(VOCAB).flip(0).numpy()), 32, folder=tmp_path)
    (tmp_path / "rows.json").unlink()
    with pytest.raises(ValueError, match=r"rows.json does not name the memory of the rows"):
        make(folder=tmp_path)


@pytest.mark.parametrize("size", [1, 3])
def test_a_buffer_of_ids_may_be_used_again_at_once(size, monkeypatch):
    monkeypatch.setattr("engram.memory.recall._WORTH_A_THREAD", 0)
    model, ids = make(SMALL.replace(conv_init="uniform")).eval(), text(T=12)
    cache, buffer, found = Cache(), torch.empty(2, size, dtype=torch.int64), []
    with torch.no_grad():
        for piece in ids.split(size, dim=1):
            recall = model.memory.recall(buffer.copy_(piece), cache=cache.memory)
            found.append(model(buffer.clone(), cache=cache, recall=recall))
            buffer.fill_(0)
        torch.testing.assert_close(torch.cat(found, dim=1), model(ids))


@pytest.mark.parametrize("name", ["documents", "dead"])
@pytest.mark.parametrize("wrong", [torch.zeros(20), torch.zeros(2, 19), torch.zeros(1, 20), np.zeros((2, 20))])
def test_arguments_about_positions_must_have_the_shape_of_the_ids(name, wrong):
    with pytest.raises(ValueError, match=rf"{name} must be a tensor of the ids' shape \[2, 20\]"):
        make().memory.recall(text(), **{name: wrong})


def test_a_folder_with_rows_of_some_layers_is_refused_and_a_failed_folder_can_be_made_again(tmp_path, monkeypatch):
    config = SMALL.replace(layers=(0, 1))
    new_table = engram.memory.build.new_table

    def full(config, layer, rows, path, mode="r+"):
        if layer == 1:
            raise OSError("no room")
        return new_table(config, layer, rows, path, mode)

    monkeypatch.setattr("engram.memory.build.new_table", full)
    with pytest.raises(OSError, match="no room"):
        make(config, folder=tmp_path / "new")
    monkeypatch.undo()
    memory = make(config, folder=tmp_path / "new").memory
    memory.close()
    (tmp_path / "new" / "layer-1.rows").unlink()
    with pytest.raises(ValueError, match=r"holds the rows of layers \[0\] and not those of \[1\]"):
        make(config, folder=tmp_path / "new")


def test_a_memory_that_was_not_closed_releases_its_files(tmp_path):
    model = make(folder=tmp_path)
    build_optimizer(model)
    gc.collect()
    build_optimizer(model)
    del model
    gc.collect()
    make(folder=tmp_path).memory.close()


def test_existing_files_are_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    memory = make(SMALL.replace(layers=(0, 1), head_dim=32)).memory
    (tmp_path / "layer-1.fp8").write_bytes(b"x")
    monkeypatch.setattr("engram.memory.encoding.encode_table", lambda *_: pytest.fail("a table was encoded"))
    with pytest.raises(ValueError, match=r"layer-1\.fp8 exists already"):
        memory.encode_tables("fp8", tmp_path)


def test_refused_ids_do_not_enter_the_cache():
    model, ids, cache = make().eval(), text(T=10), Cache()
    with torch.no_grad():
        before = model(ids[:, :5], cache=cache)
        for wrong in (-1, VOCAB):
            with pytest.raises((ValueError, IndexError)):
                model(torch.full((2, 1), wrong), cache=cache)
        for other in (torch.zeros(2, 1, dtype=torch.int16), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)):
            with pytest.raises((TypeError, ValueError), match=r"ids must be"):
                model.memory.recall(other, cache=cache.memory)
        assert cache.length == cache.memory.length == 5
        torch.testing.assert_close(torch.cat([before, model(ids[:, 5:], cache=cache)], dim=1), model(ids))


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_piece_that_begins_with_a_dead_position_does_not_read_tokens_before_it(cut):
    memory = make(SMALL.replace(conv_kernel=0, boundary="dead")).memory
    ids = torch.tensor([[5, 6, -1, 7, 8, 9]])
    whole = memory.recall(ids).row_ids
    piece = memory.recall(ids[:, cut:], lookback=ids[:, max(0, cut - 2) : cut]).row_ids
    for layer, rows in whole.items():
        assert torch.equal(rows[:, cut:], piece[layer])


def test_a_memory_of_another_shape_is_refused_by_the_backbone():
    with pytest.raises(ValueError, match=r"memory layers \(1, 3\) are out of range: the model has layers 0\.\.2"):
        make(SMALL.replace(layers=(1, 3)))
    memory = EngramMemory(SMALL, TokenMap.identity(VOCAB), 16)
    with pytest.raises(ValueError, match="memory is for 1 streams x 16"):
        Transformer(SHAPE, memory)


def test_a_token_id_outside_the_vocabulary_is_named():
    with pytest.raises(IndexError, match="50"):
        make()(torch.tensor([[1, 50]]))


def test_more_positions_than_the_model_holds_are_refused():
    with pytest.raises(ValueError, match="max_length 64"):
        make()(text(T=65))


def test_tied_embeddings_share_one_matrix():
    shape = TransformerConfig(**{**vars(SHAPE), "tie_embeddings": True})
    model = make(None, shape)
    assert model.head.weight is model.embedding.weight
    build_optimizer(model)


def test_layouts_of_two_layers_use_different_rows_for_one_ngram():
    layout = HashLayout.build(VOCAB, (1, 2), (2, 3), 2, 101, pad_id=0)
    assert not set(layout.moduli[1][0]) & set(layout.moduli[2][0])


def test_rows_fetched_ahead_of_an_update_are_renewed_bit_for_bit(monkeypatch):
    monkeypatch.setattr("engram.memory.recall._WORTH_A_THREAD", 0)  # the fetching thread runs even for this small text
    results = []
    for ahead in (False, True):
        model = make()
        optimizer = build_optimizer(model, table_lr=0.1)
        texts = [text(seed=step) for step in range(8)]
        recall = None
        for step, ids in enumerate(texts):
            following = model.memory.recall(texts[step + 1]) if ahead and step < 7 else None
            optimizer.zero_grad()
            model(ids, recall=recall).logsumexp(-1).mean().backward()
            optimizer.step()
            recall = following
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


@pytest.mark.parametrize("path", ["native", "torch"])
def test_a_written_row_reaches_a_recall_in_flight(path, monkeypatch):
    from engram.tables import kernels

    if path == "torch":
        monkeypatch.setattr(kernels, "native", None)
    memory = make().memory
    recall = memory.recall(text())
    row = recall.row_ids[1][0, 3, 2:3]
    memory.tables[1].write(row, torch.full((1, 8), 9.0))
    places = (recall.row_ids[1] == row).sum().item()
    assert memory.patch(1, row) == places >= 1
    assert torch.equal(recall.rows(1).unflatten(2, (4, 8))[0, 3, 2], torch.full((8,), 9.0))


@pytest.mark.parametrize("used", [False, True], ids=["on their way", "used before"])
@pytest.mark.parametrize("change", ["load", "encode"])
def test_a_recall_in_flight_reads_the_rows_that_replace_all_rows(change, used):
    config = SMALL.replace(head_dim=32)  # of which int4 rows can be made
    model, other, ids = make(config), make(config), text()
    for table in (*model.memory.tables.values(), *other.memory.tables.values()):
        table.write(torch.arange(table.rows), torch.randn(table.rows, table.dim))
    recall = model.memory.recall(ids)
    if used:
        model(ids, recall=recall)
    if change == "load":
        model.load_state_dict(other.state_dict())
    else:
        model.memory.encode_tables("int4")
    with torch.no_grad():
        assert torch.equal(model(ids, recall=recall), model(ids))


def test_a_recall_and_its_rows_are_freed_without_the_garbage_collector():
    import gc
    import weakref

    model = make()
    gc.disable()
    try:
        recall = model.memory.recall(text())
        model(text(), recall=recall).sum().backward()
        gone = weakref.ref(recall)
        del recall
        assert gone() is None
    finally:
        gc.enable()


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_pieces_padding_and_boundaries_read_the_rows_of_the_reference(draw):
    """Every live run within a document is a text of its own, however the text reaches the memory."""
    boundary, generator = draw.choice(["pad", "dead", "eos"]), draw.choice(["pcg64", "splitmix64"])
    config = EngramConfig(
        layers=(0, 3), orders=draw.choice([(2,), (2, 3), (2, 4)]), heads=2, head_dim=4, rows_per_head=53,
        pad_id=draw.choice([2, 7]), boundary=boundary, generator=generator,
    )  # fmt: skip
    memory = EngramMemory(config, TokenMap.identity(12), 8).eval()
    time = draw.randint(2, 14)
    ids = torch.tensor([[draw.randrange(-1 if boundary == "dead" else 0, 12) for _ in range(time)] for _ in range(2)])
    dead = torch.arange(time) < torch.tensor([[draw.randrange(time)], [0]])
    live = ~dead & (ids >= 0)
    joined = live[:, 1:] & live[:, :-1]
    runs = torch.nn.functional.pad((~joined).cumsum(1), (1, 0))
    wanted = row_ids(
        memory.layout, memory.hasher.token_map, ids.masked_fill(~live, 0).tolist(), documents=runs.tolist()
    )
    cache, first, found = MemoryCache(), 0, []
    while first < time:
        stop = first + draw.randint(1, 6)
        found.append(memory.recall(ids[:, first:stop], cache=cache, dead=dead[:, first:stop]).row_ids[3])
        first = stop
    assert torch.equal(torch.cat(found, 1)[live], torch.from_numpy(wanted[3])[live])


class LastToken:
    """Row = compressed id of the token, in every layer."""

    def __init__(self, token_map):
        self.token_map = token_map

    def __call__(self, ids, lookback=None, documents=None):
        return {layer: self.token_map(ids).unsqueeze(-1) for layer in SMALL.layers}


class Added(torch.nn.Module):
    def forward(self, rows, hidden, documents=None, history=None, dead=None):
        return rows.to(hidden.dtype), None


def own_parts(token_map):
    tables = {layer: HostTable(VOCAB, 32, init="normal", seed=SMALL.seed * 1_000_003 + layer) for layer in SMALL.layers}
    config = SMALL.replace(head_dim=32, conv_kernel=0)
    parts = {"hasher": LastToken(token_map), "fusions": {layer: Added() for layer in SMALL.layers}}
    return EngramMemory(config, token_map, 32, tables=tables, **parts)


def test_a_memory_is_built_with_addresses_and_fusions_of_its_own():
    memory, ids = own_parts(TokenMap.identity(VOCAB)), text()
    recall = memory.recall(ids)
    for layer in SMALL.layers:
        update = memory[layer](torch.zeros(*ids.shape, 32), recall)
        assert torch.equal(update, memory.tables[layer].gather(ids))
    model = Transformer(SHAPE, memory)
    optimizer = build_optimizer(model)
    model(ids).square().mean().backward()
    before = memory.tables[1].tensor.clone()
    optimizer.step()
    changed = (memory.tables[1].tensor != before).any(1).nonzero().flatten()
    assert set(changed.tolist()) == set(ids.flatten().tolist()), "the rows of the tokens, and no others"


def test_a_memory_with_addresses_of_its_own_is_not_saved_as_one_without(tmp_path):
    memory = own_parts(TokenMap.identity(VOCAB))
    with pytest.raises(ValueError, match="addressed by a LastToken, which a saved memory cannot name"):
        memory.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_parts_that_do_not_belong_to_the_memory_are_refused():
    token_map = TokenMap.identity(VOCAB)
    with pytest.raises(ValueError, match="another token map"):
        EngramMemory(SMALL, token_map, 32, hasher=LastToken(TokenMap.identity(VOCAB)))
    for layers in ((1,), (1, 2, 3), (0, 1)):
        with pytest.raises(ValueError, match=rf"the fusions belong to layers \[{', '.join(map(str, layers))}\]"):
            EngramMemory(SMALL, token_map, 32, fusions={layer: Added() for layer in layers})
