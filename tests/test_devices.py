"""Compare each available device with the CPU. Without a GPU, the CPU is compared with itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, evaluate, generate, train
from engram.lm.train import TrainConfig
from engram.tables import HostTable
from tests import hf_models
from tests.toy import VOCAB, corpus

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONFIG = TrainConfig(tokens=20 * 4 * 16, batch_size=4, context=16, lr=1e-2, table_lr=0.05, warmup_steps=3)
MEMORY = EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=997, table_init="normal", table_std=0.02)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def threads(monkeypatch) -> None:
    """Fetch rows on the prefetch thread (and copy them on its own stream) even for these small texts."""
    monkeypatch.setattr("engram.memory.recall._WORTH_A_THREAD", 0)


def trained(device: str, prefetch: bool = True) -> tuple[Transformer, list[float]]:
    torch.manual_seed(1)
    memory = EngramMemory(MEMORY, TokenMap.identity(VOCAB), 32)
    torch.manual_seed(0)
    shape = TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=2, max_length=64)
    model = Transformer(shape, memory).to(device)
    log = train(model, corpus(), CONFIG, prefetch=prefetch)
    return model, [loss for _, loss in log.curve]


def test_a_model_is_trained_on_its_device_and_its_rows_in_host_memory(device, threads):
    (model, losses), (reference, expected) = trained(device), trained("cpu")
    assert next(model.parameters()).device.type == device
    assert losses == pytest.approx(expected, rel=1e-3) and losses[-1] < losses[0]
    rows, same = (m.memory.tables[1].gather(torch.arange(200)) for m in (model, reference))
    assert rows.device.type == "cpu"
    torch.testing.assert_close(rows, same, rtol=0.05, atol=1e-3)


def test_training_is_the_same_with_and_without_prefetching(device, threads):
    ahead, waiting = (trained(device, prefetch)[1] for prefetch in (True, False))
    assert ahead == pytest.approx(waiting, rel=1e-4)


def test_a_trained_model_evaluates_generates_and_explains_as_on_the_cpu(device, threads):
    model, _ = trained("cpu")
    data, prompt = corpus(seed=3), torch.from_numpy(corpus(seed=4).ids[:12]).long()[None]
    results = []
    for where in ("cpu", device):
        model.to(where)
        score = evaluate(model, data)
        tokens = generate(model, prompt.to(where), 8, temperature=0, prefill=5).cpu()
        explanation = engram.explain(model, prompt[0])
        results.append(
            (score.loss, tokens, explanation.loss[:-1], explanation.loss_off[:-1], explanation.layers[1].rows)
        )
    (loss, tokens, nats, off, rows), (loss2, tokens2, nats2, off2, rows2) = results
    assert loss2 == pytest.approx(loss, rel=1e-4) and torch.equal(tokens, tokens2)
    np.testing.assert_allclose(nats2, nats, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(off2, off, rtol=1e-3, atol=1e-4)
    assert np.array_equal(rows, rows2)


@pytest.mark.parametrize("codec", [None, "fp8", "pq8"])
def test_an_attached_memory_moves_to_the_device_of_its_model(device, codec, threads):
    model, ids = hf_models.build("llama"), hf_models.text()
    memory = engram.attach(model, MEMORY.replace(head_dim=32, table_std=0.5), TokenMap.identity(hf_models.VOCAB))
    if codec is not None:
        memory.encode_tables(codec)
    with torch.no_grad():
        expected, longer = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        model.to(device)
        torch.testing.assert_close(model(ids.to(device)).logits.cpu(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(model.generate(ids.to(device), max_new_tokens=5, do_sample=False).cpu(), longer)


@pytest.fixture
def default(device) -> Iterator[str]:
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)


def test_rows_stay_in_host_memory_if_another_device_is_the_default(default, threads):
    table = HostTable(100, 8, init="normal", std=1.0)
    ids = torch.tensor([3, 99, 3])
    assert table.tensor.device.type == "cpu" == table.gather(ids).device.type and table.gather(ids).any()
    model, losses = trained(default)
    assert next(model.parameters()).device.type == default and losses[-1] < losses[0]
