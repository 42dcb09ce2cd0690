"""The numbers of the drawings, from calls of the library with toy sizes."""

from __future__ import annotations

import numpy as np
import torch

import engram
from engram import EngramConfig, EngramMemory, HashLayout, HostTable, NgramHasher, TokenMap
from engram.tables.codecs import PQ, get_codec

TOKENS = ("The", "the", "cat", "Cat", "sat", "on", "mat")
CLASSES = (0, 0, 1, 1, 2, 3, 4)  # tokens that differ in case alone share a compressed id
TEXT = ("cat", "sat", "on")
CONFIG = EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=32, rows_per_head=10)


def toy_map() -> TokenMap:
    return TokenMap(np.array(CLASSES))


def addresses() -> tuple[list[int], list[int], list[int], HashLayout]:
    """Token ids, compressed ids and row ids of the last position of TEXT, and the layout that gives them."""
    token_map = toy_map()
    layout = HashLayout.build(token_map.size, layers=(1,), orders=(2, 3), heads=2, rows_per_head=10, pad_id=0)
    ids = [TOKENS.index(token) for token in TEXT]
    rows = NgramHasher(layout, token_map)(np.array([ids]))[1][0, -1]
    return ids, [CLASSES[i] for i in ids], rows.tolist(), layout


def mixes(compressed: list[int], layout: HashLayout) -> dict[int, int]:
    """{order: the n-gram that ends the text, as one number before the remainders are taken}."""
    products = np.array([c * m for c, m in zip(reversed(compressed), layout.multipliers[1], strict=True)])
    return {n: int(np.bitwise_xor.reduce(products[:n])) for n in (2, 3)}


def row_sizes() -> list[tuple[str, int]]:
    """[(how a row is stored, its bytes)], as the library stores them."""
    dim = CONFIG.head_dim
    sizes = [(str(dtype)[6:], HostTable(1, dim, dtype).nbytes) for dtype in (torch.float32, torch.bfloat16)]
    sizes += [(name, get_codec(name, dim).row_bytes(dim)) for name in ("int8", "fp8", "int4")]
    return [*sizes, *((f"pq{width}", PQ(torch.zeros(dim // width, 256, width)).row_bytes(dim)) for width in (4, 8))]


def state_sizes() -> list[tuple[str, int]]:
    """[(row optimizer, bytes of its state per row)], as build_optimizer makes them."""
    sizes = []
    for name in ("rms", "adagrad", "adam"):
        memory = EngramMemory(CONFIG, toy_map(), hidden_size=16)
        rows = engram.build_optimizer(memory, table_optimizer=name).row_optimizers[0]
        sizes.append((name, rows.nbytes // memory.tables[1].rows))
    return sizes


def gate_numbers() -> dict[str, float]:
    """Score and gate at the last position of TEXT, of a memory with random rows and a random hidden state."""
    torch.manual_seed(0)
    config = CONFIG.replace(table_init="normal")
    memory = EngramMemory(config, toy_map(), hidden_size=16)
    recall = memory.recall(torch.tensor([addresses()[0]]))
    fusion, hidden = memory.fusions["1"], torch.randn(1, len(TEXT), 16)
    gate = fusion.gate(recall.rows(1), hidden)[0, -1, 0].item()
    root = float(np.log(gate / (1 - gate)))  # what the sigmoid was given
    return {"score": np.sign(root) * root**2, "root": root, "gate": gate, "e": config.d_mem, "lag": config.dilation}


def recall_numbers() -> dict[str, int]:
    """Counts of one training step of a memory with two layers."""
    torch.manual_seed(0)
    memory = EngramMemory(CONFIG.replace(layers=(1, 3), rows_per_head=64), TokenMap.identity(100), hidden_size=16)
    optimizer = engram.build_optimizer(memory, table_lr=0.03)
    ids, x = torch.randint(0, 100, (2, 10)), torch.randn(2, 10, 16)
    recall = memory.recall(ids)
    for layer in memory.config.layers:
        x = x + memory[layer](x, recall)
    x.square().sum().backward()
    optimizer.step()
    reads = {layer: rows.numel() for layer, rows in recall.row_ids.items()}
    return {"ids": ids.numel(), "reads": reads[1], "touched": optimizer.touched}
