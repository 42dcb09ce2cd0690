"""A small DeepSeek-V4 with everything on, trained with an Engram at two layers and without, on the same batches.

    python examples/deepseek_v4_tiny.py                 # some minutes on two cores
    python examples/deepseek_v4_tiny.py --steps 3       # does it run here?

The backbone is transformers' own: top-16 of 256 experts and a shared one, the first layer routed by token id, four
residual streams (hyper-connections), sliding-window, compressed sparse (with the lightning indexer) and heavily
compressed attention. transformers has no Engram for it; `engram.attach` adds one before the attention of layers 1 and
3, as DeepSeek-V4.1 has it: a gate for every stream and no convolution.

What it shows is that the parts train together, and which loss is lower after equally many steps. The model with memory
has more parameters and reads them sparsely; see experiments/ for comparisons at equal parameters, compute or time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import torch
import transformers

import engram
from engram.lm.corpus import load_corpus, split
from engram.lm.tokenizer import encode, train_tokenizer
from engram.lm.train import Batches

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
MEMORY = engram.EngramConfig(
    layers=(1, 3), orders=(2, 3), heads=4, head_dim=32, rows_per_head=65_536, conv_kernel=0, gate_eps=1e-6
)


def backbone(vocab_size: int, seed: int = 0) -> transformers.PreTrainedModel:
    """The plain model, with the same weights for the same seed."""
    config = transformers.DeepseekV4Config(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        partial_rotary_factor=0.5,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        layer_types=["sliding_attention", CSA, HCA, CSA, HCA],
        compress_rates={CSA: 4, HCA: 16},
        sliding_window=64,
        index_n_heads=8,
        index_head_dim=32,
        index_topk=16,
        hc_mult=4,
        n_routed_experts=256,
        num_experts_per_tok=16,
        n_shared_experts=1,
        moe_intermediate_size=32,
        mlp_layer_types=["hash_moe", "moe", "moe", "moe", "moe"],
        output_router_logits=True,  # the loss then balances the experts' load
        max_position_embeddings=1024,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.DeepseekV4ForCausalLM(config)
    # Which experts a token id goes to is part of a checkpoint; an untrained model has zeros there.
    for module in model.modules():
        if hasattr(module, "tid2eid"):
            module.tid2eid.copy_(torch.rand(vocab_size, 256).topk(16).indices)
    return model


@dataclass
class Arm:
    """One of the two models, with what trains it."""

    name: str
    model: transformers.PreTrainedModel
    optimizer: engram.optimizer.EngramOptimizer
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def step(self, ids: torch.Tensor, targets: torch.Tensor, scale: float) -> None:
        """One training step at `scale` times the learning rates."""
        began = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
        self.optimizer.zero_grad()
        out = self.model(input_ids=ids, use_cache=False)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        (loss + self.model.router_aux_loss_coef * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def validate(self, batches: Batches, count: int) -> float:
        """Mean loss in nats per token over the first `count` batches of the held-out text."""
        self.model.eval()
        total = 0.0
        for number in range(count):
            ids, targets, _ = batches(number)
            logits = self.model(input_ids=ids, use_cache=False).logits
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--corpus", default="stdlib", help="as in `engram train --corpus`")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    parts = split(load_corpus(given.corpus))
    tokenizer = train_tokenizer([document.text for document in parts.train], 4096)
    train = Batches(encode(tokenizer, parts.train), given.context, given.batch_size, given.seed)
    held_out = Batches(encode(tokenizer, parts.validation), given.context, given.batch_size)

    arms = []
    for name in ("without memory", "with memory"):
        model = backbone(tokenizer.get_vocab_size(), given.seed)
        if name == "with memory":
            engram.attach(model, MEMORY, tokenizer)
        optimizer = engram.build_optimizer(model, lr=3e-3, table_lr=0.03)
        arms.append(Arm(name, model, optimizer))
        rows = sum(m.table_parameters() for m in model.modules() if isinstance(m, engram.EngramMemory))
        print(f"{name}: {model.num_parameters():,} dense parameters, {rows:,} in tables")

    print(f"\n{'step':>6} {'tokens':>10} {'without':>9} {'with':>9} {'difference':>11}   training loss, nats per token")
    window = max(1, given.steps // 15)
    for step in range(given.steps):
        ids, targets, _ = train(step)
        scale = min(1.0, (step + 1) / 30, (given.steps - step) / (0.4 * given.steps))
        for arm in arms:
            arm.step(ids, targets, scale)
        if (step + 1) % window == 0 or step + 1 == given.steps:
            plain, memory = (sum(arm.losses[-window:]) / len(arm.losses[-window:]) for arm in arms)
            tokens = (step + 1) * ids.numel()
            print(f"{step + 1:>6} {tokens:>10,} {plain:>9.3f} {memory:>9.3f} {memory - plain:>+11.3f}", flush=True)

    count = min(held_out.per_epoch, 40 if given.steps > 20 else 1)
    print(f"\nheld-out documents, {count * given.batch_size * given.context:,} tokens:")
    for arm in arms:
        loss, speed = arm.validate(held_out, count), given.steps * ids.numel() / arm.seconds
        print(f"{arm.name:>15}: {loss:.3f} nats per token, trained at {speed:,.0f} tokens/s")


if __name__ == "__main__":
    main()
