"""What other libraries do to a model with a memory: build it on meta, copy, pickle, trace, quantise, save, load."""

from __future__ import annotations

import copy
import io
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers as hf
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.memory.digests import _digest
from tests.hf_models import build

VOCAB = 64
CONFIG = EngramConfig(layers=(0, 1), heads=2, head_dim=8, rows_per_head=499)
IDENTITY = TokenMap.identity(VOCAB)


def make(seed: int = 0, folder=None, **changes) -> Transformer:
    torch.manual_seed(seed)
    memory = EngramMemory(CONFIG.replace(**changes), IDENTITY, 32, folder=folder)
    return Transformer(TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=2, max_length=64), memory)


def text(batch: int = 4, time: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    output = model(text(seed=seed))
    logits = getattr(output, "logits", output)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text(seed=seed)[:, 1:].flatten()).backward()
    optimizer.step()


def trained(steps: int = 2, optimizer: str = "rms", **changes):
    model = make(**changes)
    optimizer = build_optimizer(model, table_optimizer=optimizer)
    for seed in range(steps):
        step(model.train(), optimizer, seed)
    return model, optimizer


def rows(model) -> torch.Tensor:
    memory = model if isinstance(model, EngramMemory) else next(m for m in model.modules() if type(m) is EngramMemory)
    return torch.cat([table.tensor.float() for table in memory.tables.values()]).clone()


def update(model) -> torch.Tensor:
    """Return what the memory of layer 1 adds to a hidden state."""
    hidden = torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(0))
    return model.memory[1](hidden, model.memory.recall(text()))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def attached(name: str = "llama", seed: int = 1, **changes):
    model = build(name)
    torch.manual_seed(seed)
    memory = engram.attach(model, CONFIG.replace(conv_init="uniform", **changes), IDENTITY)
    for table in memory.tables.values():
        table.tensor.copy_(torch.randn(table.tensor.shape))
    return model, memory


# Built on the meta device


class Config(hf.PretrainedConfig):
    model_type = "with_memory"


class WithMemory(hf.PreTrainedModel):
    """A user's own model that has a memory from the beginning."""

    config_class = Config
    made: ClassVar[dict[str, str]] = {}
    folder = None

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, 32)
        self.memory = EngramMemory(CONFIG.replace(**self.made), IDENTITY, 32, folder=self.folder)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, engram.fusion.EngramFusion):
            module.reset_parameters()

    def forward(self, ids):
        recall, x = self.memory.recall(ids), self.embed(ids)
        for layer in self.memory.tables:
            x = x + self.memory[layer](x, recall)
        return x


@pytest.mark.parametrize(
    "changes",
    [{}, {"table_init": "normal"}, {"table_dtype": "bfloat16"}, {"table_init": "normal", "table_dtype": "bfloat16"}],
)
def test_a_model_of_transformers_with_a_memory_of_its_own_saves_and_loads(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(WithMemory, "made", changes)
    model = WithMemory(Config())
    model.memory.tables[1].write(torch.arange(5), torch.randn(5, 8))
    model.save_pretrained(tmp_path)
    loaded, report = WithMemory.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert same(loaded, model) and torch.equal(loaded(text()), model(text()))
    for dtype in (torch.bfloat16, torch.float16):
        half = WithMemory.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(rows(half), rows(model)), "rows are as they were written, whatever the weights are read as"


def test_rows_that_a_checkpoint_lacks_are_the_initial_ones_and_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(WithMemory, "made", {"table_init": "normal"})
    model = WithMemory(Config())
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("memory.")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, report = WithMemory.from_pretrained(tmp_path, output_loading_info=True)
    assert {"memory.tables.0", "memory.tables.1", "memory.fusions.0.key_norm"} <= set(report["missing_keys"])
    ids = torch.arange(100)
    assert all(torch.equal(loaded.memory.tables[i].gather(ids), model.memory.tables[i].gather(ids)) for i in (0, 1))
    assert not loaded.memory.tables[0].tensor.any() and (loaded.memory.fusions["0"].key_norm == 1).all()


def test_rows_of_another_layout_or_shape_are_refused_by_from_pretrained(tmp_path, monkeypatch):
    WithMemory(Config()).save_pretrained(tmp_path)
    monkeypatch.setattr(WithMemory, "made", {"seed": 3})
    with pytest.raises(Exception, match=r"hash layout|size"):
        WithMemory.from_pretrained(tmp_path)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_a_memory_made_on_meta_is_real_once_it_is_filled(tmp_path, assign, folder):
    model, _ = trained()
    with torch.device("meta"):
        other = make(folder=tmp_path / "tables" if folder else None)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in other.state_dict().items()} == shapes
    assert other.state_dict()["memory.tables.1"].is_meta and not (tmp_path / "tables").exists()
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    assert same(other, model) and torch.equal(update(other), update(model))
    if folder:
        other.memory.close()
        again = make(folder=tmp_path / "tables")  # rows.json says whose they are
        assert torch.equal(rows(again), rows(model))


def test_to_empty_gives_the_initial_rows_and_a_meta_state_dict_fills_nothing():
    with torch.device("meta"):
        model = make(table_init="normal")
    meta = model.state_dict()
    model.half()
    assert model.memory.tables[0].on_meta
    model.to_empty(device="cpu")
    ids = torch.arange(9)
    assert torch.equal(model.memory.tables[1].gather(ids), make(table_init="normal").memory.tables[1].gather(ids))
    with pytest.raises(RuntimeError, match="on the meta device and holds no rows"):
        model.load_state_dict({**model.state_dict(), "memory.tables.1": meta["memory.tables.1"]})


def test_rows_are_found_by_the_names_of_the_state_dict():
    model = make()
    assert torch.equal(model.get_parameter("memory.tables.1"), model.memory.tables[1].tensor)
    model.memory.tables[1].write(torch.tensor([3]), torch.ones(1, 8))
    assert model.get_parameter("memory.tables.1")[3].sum() == 8
    with pytest.raises(AttributeError):
        model.get_parameter("memory.tables.2")
    with pytest.raises(ValueError, match="do not fit"):
        setattr(model.memory.tables, "1", torch.zeros(3, 8))
    assert not list(model.memory.tables.parameters()) and not list(model.memory.tables.buffers())
    unexpected = model.load_state_dict({**model.state_dict(), "memory.tables.7": torch.zeros(1)}, strict=False)
    assert unexpected.unexpected_keys == ["memory.tables.7"]


# torch.distributed.checkpoint


@pytest.mark.parametrize("optimizer", ["rms", "adam", "adagrad", "sinkhorn"])
def test_a_distributed_checkpoint_holds_rows_and_their_state(tmp_path, optimizer):
    model, ours = trained(optimizer=optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, ours)}
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    other = make(seed=5)
    theirs = build_optimizer(other, table_optimizer=optimizer)
    state = {"model": get_model_state_dict(other), "optimizer": get_optimizer_state_dict(other, theirs)}
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, theirs, state["optimizer"])
    for seed in (7, 8):
        step(model, ours, seed)
        step(other, theirs, seed)
    assert same(model, other) and rows(model).any()
    assert [o.steps for o in theirs.row_optimizers] == [o.steps for o in ours.row_optimizers] == [4, 4]


@pytest.mark.parametrize("frozen", [(), ("value",), ("memory.fusions",), ("memory.fusions.0", "blocks")])
def test_a_state_by_names_carries_rows_whichever_weights_learn(frozen):
    def pair(seed):
        model = make(seed)
        for name, weight in model.named_parameters():
            weight.requires_grad_(not any(part in name for part in frozen))
        return model, build_optimizer(model)

    (model, ours), (other, theirs) = pair(0), pair(1)
    step(model, ours)
    options = StateDictOptions(cpu_offload=True)
    state = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, ours, options=options)
    weights, state = copy.deepcopy(state)  # else torch lets both optimizers write into one state
    set_model_state_dict(other, weights)
    set_optimizer_state_dict(other, theirs, state)
    step(model, ours, 1)
    step(other, theirs, 1)
    assert same(model, other) and rows(model).any()


def test_codebooks_have_names_that_resolve():
    model, _ = trained()
    model.memory.encode_tables("pq8")
    state = get_model_state_dict(model)
    assert {"memory.codebooks.0", "memory.tables.1"} <= set(state)
    other, _ = trained()
    other.memory.encode_tables("pq8")
    set_model_state_dict(other, state)
    assert torch.equal(other(text()), model(text()))


def test_a_state_in_the_earlier_form_still_loads():
    model, ours = trained()
    saved = copy.deepcopy(ours.state_dict())
    layers = [{layer: o.state_dict() for layer, o in ours.rows[0].items()}]
    state = {key: {k: v for k, v in values.items() if k != "rows"} for key, values in saved["state"].items()}
    old = copy.deepcopy({**saved, "state": state, "rows": layers, "memories": [_digest(model.memory.fusions)]})
    other = make(seed=3)
    theirs = build_optimizer(other)
    theirs.load_state_dict(old)
    with pytest.raises(RuntimeError, match="beside other weights"):
        step(other, theirs, 5)
    theirs.load_state_dict(old)
    other.load_state_dict(model.state_dict())
    step(other, theirs, 6)
    step(model, ours, 6)
    assert same(other, model)


def test_an_optimizer_state_survives_torch_save_and_one_of_another_make_is_refused():
    model, ours = trained()
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    theirs = build_optimizer(other)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))
    step(model, ours, 3)
    step(other, theirs, 3)
    assert same(other, model)
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="no table"):
        theirs.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="not the state of an optimizer"):
        theirs.load_state_dict({"param_groups": []})


# No false alarm of the guard between optimizer state and weights


def test_a_state_that_holds_no_rows_yet_belongs_to_any_weights():
    for order in ("before", "after"):
        model, other = make(), make(seed=4)
        optimizer = build_optimizer(model)
        if order == "before":
            model.load_state_dict(other.state_dict())
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # accelerator.prepare() does this
        model.load_state_dict(other.state_dict())
        step(model, optimizer)
        assert optimizer.touched


@pytest.mark.parametrize("was", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_state_belongs_to_its_weights_in_whatever_dtype_they_are_now(was, now):
    model = make().to(was)
    ours = build_optimizer(model, lr=1e-3)
    step(model, ours)
    other = make(seed=2).to(was)
    other.load_state_dict(model.state_dict())
    other.to(now)
    theirs = build_optimizer(other)
    theirs.load_state_dict(ours.state_dict())
    step(other, theirs, 1)
    wrong = make(seed=2).to(now)
    theirs = build_optimizer(wrong)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="beside other weights"):
        step(wrong, theirs, 1)


def test_only_the_memory_whose_rows_were_trained_is_guarded():
    def pair(seed):
        both = nn.ModuleList([make(seed), make(seed + 1)])
        both[1].memory.config = both[1].memory.config.replace()
        return both, build_optimizer(both)

    both, ours = pair(0)
    step(both[0], ours)
    other, theirs = pair(7)
    theirs.load_state_dict(ours.state_dict())
    other[0].load_state_dict(both[0].state_dict())
    step(other[0], theirs, 1)  # the second has other weights, and no row of it was trained
    assert theirs.touched


# Copies


def test_a_deep_copy_of_a_memory_is_independent():
    model, optimizer = trained(table_init="normal")
    twin = copy.deepcopy(model)
    assert same(twin, model) and torch.equal(twin(text()), model(text()))
    before = rows(twin)
    step(model, optimizer, 5)
    assert torch.equal(rows(twin), before) and not torch.equal(rows(model), before)
    assert not twin.memory.gradients.has_optimizer and not any(twin.memory.gradients.values())
    step(twin, build_optimizer(twin), 6)
    assert not torch.equal(rows(twin), before)
    twin.memory.close()
    step(model, optimizer, 6)


@pytest.mark.parametrize("codec", [None, "fp8", "pq8"])
@pytest.mark.parametrize("mode", ["files", "shared"])
def test_a_copy_of_tables_in_files_has_its_rows_in_memory_and_shares_read_only_files(tmp_path, codec, mode):
    model, _ = trained(folder=tmp_path / "tables", head_dim=32)
    if codec:
        model.memory.encode_tables(codec, tmp_path / "encoded")
    memory = model.memory
    if mode == "shared":
        memory = EngramMemory.load(memory.save(tmp_path / "saved"), mode="shared")
    twin = copy.deepcopy(memory)
    ids = torch.arange(memory.tables[1].rows)
    expected = memory.tables[1].gather(ids).clone()
    memory.close()
    assert torch.equal(twin.tables[1].gather(ids), expected)
    assert all((table.path is None) == (mode == "files") for table in twin.tables.values())
    twin.close()


def test_a_copy_that_does_not_fit_is_refused_by_name(tmp_path, monkeypatch):
    model, _ = trained()
    monkeypatch.setattr("engram.storage.limits.free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"HostTable.*rows_in"):
        copy.deepcopy(model)


def test_a_copy_of_a_model_and_its_optimizer_trains_as_they_do():
    model, optimizer = trained(optimizer="adam")
    twin, its = copy.deepcopy((model, optimizer))
    step(model, optimizer, 4)
    step(twin, its, 4)
    assert same(model, twin) and its.touched == optimizer.touched and twin.memory.gradients.has_optimizer
    assert its.memories == [twin.memory] and its.row_optimizers[0].table is twin.memory.tables[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_images"])
def test_a_deep_copy_of_an_attached_model_has_a_memory_and_hooks_of_its_own(name):
    model, memory = attached(name)
    twin = copy.deepcopy(model)
    logits = model(text()).logits
    assert torch.equal(twin(text()).logits, logits)
    copied = next(m for m in twin.modules() if isinstance(m, EngramMemory))
    assert copied is not memory and copied.attachment is not memory.attachment
    for table in memory.tables.values():
        table.tensor.zero_()
    assert torch.equal(twin(text()).logits, logits) and not torch.equal(model(text()).logits, logits)
    assert memory.detach() is model
    assert torch.equal(twin(text()).logits, logits), "the copy keeps its hooks"
    assert engram.detach(twin) is copied and torch.equal(twin(text()).logits, build(name)(text()).logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())


def test_copies_of_a_peft_model_and_of_an_averaged_one_are_independent_too():
    from peft import LoraConfig, get_peft_model

    model, _ = attached()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    twin = copy.deepcopy(wrapped)
    assert torch.equal(twin(text()).logits, wrapped(text()).logits)
    assert engram.detach(twin).attachment is None and wrapped(text()).logits.isfinite().all()
    averaged = torch.optim.swa_utils.AveragedModel(wrapped)
    assert torch.equal(averaged(text()).logits, wrapped(text()).logits)
    alone = copy.deepcopy(next(m for m in wrapped.modules() if isinstance(m, EngramMemory)))
    assert alone.attachment is None and len(alone.tables) == 2


def test_a_copy_of_one_layer_does_not_copy_the_tables(monkeypatch):
    model, _ = attached()
    monkeypatch.setattr(engram.HostTable, "__deepcopy__", lambda *_: pytest.fail("a table was copied"))
    layer = copy.deepcopy(model.model.layers[1])
    with pytest.raises(RuntimeError, match="outside a forward pass"):
        layer(torch.zeros(1, 2, 32))


# What tools do to modules


@pytest.mark.parametrize("kind", ["own", "attached", "memory", "optimizer"])
def test_the_error_for_pickling_names_the_alternative(kind):
    model, optimizer = trained()
    thing = {"own": model, "attached": attached()[0], "memory": model.memory, "optimizer": optimizer}[kind]
    with pytest.raises(TypeError, match=r"not pickled.*memory\.save"):
        torch.save(thing, io.BytesIO())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["own", "attached"])
@pytest.mark.parametrize("tool", ["jit.trace", "export", "make_fx", "vmap", "grad"])
@pytest.mark.filterwarnings("ignore")
def test_recording_or_transforming_operations_is_refused_by_name(kind, tool):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = (make() if kind == "own" else Logits(attached()[0])).eval()
    ids, weights = text(1), dict(model.named_parameters())
    plain = model(ids)
    use = {
        "jit.trace": lambda: torch.jit.trace(model, (ids,), check_trace=False),
        "export": lambda: torch.export.export(model, (ids,), strict=False),
        "make_fx": lambda: make_fx(model)(ids),
        "vmap": lambda: torch.vmap(lambda x: model(x[None]))(text(3)),
        "grad": lambda: torch.func.grad(lambda w: torch.func.functional_call(model, w, (ids,)).sum())(weights),
    }[tool]
    with pytest.raises(RuntimeError, match=r"records or transforms.*detach the memory"):
        use()
    assert torch.equal(model(ids), plain)


def test_symbolic_tracing_of_an_attached_model_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"symbolic_trace.*detach"):
        torch.fx.symbolic_trace(Logits(attached()[0]))


@pytest.mark.parametrize("kind", ["own", "attached"])
@pytest.mark.parametrize("gate", ["signed_sqrt", "none"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation_reaches_the_fusion(kind, gate):
    model = (make(gate=gate) if kind == "own" else Logits(attached(gate=gate)[0])).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    memory = next(m for m in quantised.modules() if isinstance(m, EngramMemory))
    assert "quantized" in type(memory.fusions["0"].value).__module__
    with torch.no_grad():
        plain, found = model(text()), quantised(text())
    assert 0 < (plain - found).abs().max() < 0.2 * plain.abs().max()


class Packed(nn.Module):
    """A linear layer as weight-only quantisers leave it: integers and scales."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().clamp(-127, 127).to(torch.int8))

    def forward(self, x):
        assert x.dtype == self.scale.dtype
        return x @ (self.weight * self.scale).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stored_as_integers_do_not_round_the_rows(dtype):
    model, memory = attached()
    model.to(dtype)
    plain = model(text()).logits
    for fusion in memory.fusions.values():
        fusion.value, fusion.key = Packed(fusion.value), Packed(fusion.key)
    assert (model(text()).logits - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_accelerate_keeps_in_host_memory_or_on_disk_are_loaded_for_use(tmp_path, when):
    from accelerate import cpu_offload, disk_offload

    for offload in (cpu_offload, lambda m, execution_device: disk_offload(m, str(tmp_path), execution_device)):
        plain = attached()[0](text()).logits
        model = attached()[0] if when == "before" else build("llama")
        offload(model, execution_device=torch.device("cpu"))
        if when == "after":
            torch.manual_seed(1)
            memory = engram.attach(model, CONFIG.replace(conv_init="uniform"), IDENTITY)
            for table in memory.tables.values():
                table.tensor.copy_(torch.randn(table.tensor.shape))
        with torch.no_grad():
            assert (model(text()).logits - plain).abs().max() < 1e-5


def test_copies_for_data_parallel_are_refused():
    for model in (make(), attached()[0]):
        with pytest.raises(RuntimeError, match="one device per process"):
            [module._replicate_for_data_parallel() for module in model.modules()]


@pytest.mark.parametrize(
    "parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrised_weights_train_and_functional_calls_read_rows(parametrize):
    model = make()
    for fusion in model.memory.fusions.values():
        parametrize(fusion.value)
    optimizer = build_optimizer(model)
    step(model, optimizer)
    assert optimizer.touched and rows(model).any()
    model.eval()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, weights, (text(),)), model(text()))


# Several processes


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)


def test_several_processes_are_refused_before_anything_is_computed(two_processes):
    with pytest.raises(RuntimeError, match="2 processes train this memory, which is not supported yet"):
        build_optimizer(make())
    frozen = make()
    frozen.memory.requires_grad_(False)
    step(frozen, build_optimizer(frozen))
    with torch.no_grad():
        make()(text())
    make().eval()(text())
    with pytest.raises(RuntimeError, match="not supported yet"):
        make()(text())


def test_an_optimizer_from_before_the_processes_is_refused_when_it_is_prepared(monkeypatch):
    _, optimizer = trained()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(RuntimeError, match="not supported yet"):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="not supported yet"):
        optimizer.step()


# Model folders


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_images", "mixtral", "qwen3"])
def test_a_saved_model_loads_with_its_memory_and_transformers_alone_refuses_it(tmp_path, name):
    model, memory = attached(name)
    model.save_pretrained(tmp_path)
    logits = model(text()).logits
    for kind in (hf.AutoModel, hf.AutoModelForCausalLM, type(model)):
        with pytest.raises(ValueError, match=r"engram\.from_pretrained|quantization config"):
            kind.from_pretrained(tmp_path)
    loaded = engram.from_pretrained(tmp_path, tokenizer=IDENTITY)
    assert type(loaded) is type(model) and torch.equal(loaded(text()).logits, logits)
    engram.detach(loaded).save(tmp_path / "alone")
    assert torch.equal(loaded(text()).logits, build(name)(text()).logits)
    for folder in (tmp_path, tmp_path / "engram", tmp_path / "alone"):
        other = build(name)
        engram.attach(other, folder, IDENTITY)
        assert torch.equal(other(text()).logits, logits)
    rows_written = sum(table.nbytes for table in memory.tables.values())
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    aside = sum(path.stat().st_size for path in (tmp_path / "engram").iterdir())
    weights = sum(p.nbytes for p in model.parameters())
    assert weights + rows_written <= written < weights + 1.5 * rows_written and aside < rows_written / 5
    with pytest.raises(ValueError, match="another tokenizer"):
        engram.from_pretrained(tmp_path, tokenizer=TokenMap.identity(VOCAB - 1))


@pytest.mark.parametrize("form", ["shards", "bfloat16", "pq8", "int8", "saved twice", "loaded and saved"])
def test_model_folders_of_every_form_load(tmp_path, form):
    model, memory = attached("llama", head_dim=32, table_dtype="bfloat16" if form == "bfloat16" else "float32")
    if form == "bfloat16":
        model.bfloat16()
    if form in ("pq8", "int8"):
        memory.encode_tables(form)
    if form == "saved twice":
        model.save_pretrained(tmp_path)
        memory.tables[0].tensor.add_(1)
    model.save_pretrained(tmp_path, **({"max_shard_size": "60KB"} if form == "shards" else {}))
    if form == "loaded and saved":
        model = engram.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    loaded = engram.from_pretrained(tmp_path, dtype="auto")
    assert same(loaded, model)
    if form != "bfloat16":  # in which the model above has rotary frequencies of another dtype, memory or not
        assert torch.equal(loaded(text()).logits, model(text()).logits)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    engram.detach(model)
    model.save_pretrained(tmp_path)
    assert same(hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)
    with pytest.raises(FileNotFoundError, match="without a memory"):
        engram.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes one memory, the shards in .* hold 0"):
        engram.attach(model, tmp_path)


def test_damaged_model_folders_are_refused_by_the_name_of_the_file(tmp_path):
    model, _ = attached()
    model.save_pretrained(tmp_path)
    for path in (tmp_path / "engram" / "config.json", tmp_path / "config.json"):
        whole = path.read_text()
        for broken in (
            "{",
            "[]",
            '{"engram": 3}',
            '{"engram": {"opened_as": "llama"}, "model_type": "x"}',
            "[" * 9999,
        ):
            path.write_text(broken)
            with pytest.raises(ValueError, match=str(path)):
                engram.from_pretrained(tmp_path)
        path.write_text(whole)
    facts = tmp_path / "engram" / "config.json"
    facts.write_text(facts.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(ValueError, match="another"):
        engram.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="model folder"):
        engram.from_pretrained(tmp_path / "nowhere")


def test_a_model_saved_beside_a_saved_memory_opens_with_it(tmp_path):
    model, memory = attached()
    logits = model(text()).logits
    memory.save(tmp_path / "engram")
    memory.detach().save_pretrained(tmp_path)
    assert torch.equal(engram.from_pretrained(tmp_path, IDENTITY)(text()).logits, logits)


# transformers' Trainer


def run(folder, peft: bool, steps: int, resume=None, callback: bool = True, **options):
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    if peft:
        torch.manual_seed(2)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    torch.manual_seed(3)
    memory = engram.attach(model, CONFIG, IDENTITY)
    data = [{"input_ids": row, "labels": row} for row in text(24)]
    arguments = hf.TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, seed=3, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    optimizer = build_optimizer(model, lr=0.01, table_lr=0.1)
    trainer = hf.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:4], optimizers=(optimizer, None),
        callbacks=[engram.MemoryCallback()] if callback else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, memory


@pytest.mark.parametrize("peft", [True, False])
def test_a_trainer_resumes_bit_for_bit(tmp_path, peft):
    trainer, _ = run(tmp_path, peft, 4)
    again, memory = run(tmp_path, peft, 4, resume=str(tmp_path / "checkpoint-2"))
    assert same(again.model, trainer.model) and rows(memory).any()
    assert (tmp_path / "checkpoint-2" / "engram" / "manifest.json").exists() == peft, "rows are written once"
    if not peft:
        without, _ = run(tmp_path, peft, 4, resume=str(tmp_path / "checkpoint-2"), callback=False)
        assert same(without.model, trainer.model), "its checkpoints hold the rows among the weights"


def test_a_trainer_goes_back_to_the_rows_of_the_best_checkpoint(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer, memory = run(tmp_path, True, 4, metric_for_best_model="loss", **options)  # the first is the worst
    best = EngramMemory.load(tmp_path / "checkpoint-2" / "engram")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and torch.equal(rows(memory), rows(best))
    assert not torch.equal(rows(memory), rows(EngramMemory.load(tmp_path / "checkpoint-4" / "engram")))


def test_a_checkpoint_of_adapters_without_their_memory_is_refused_by_name(tmp_path):
    run(tmp_path, True, 2, callback=False)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2 holds adapters of PEFT without their memory"):
        run(tmp_path, True, 4, resume=str(tmp_path / "checkpoint-2"))
    with pytest.raises(RuntimeError, match="MemoryCallback"):
        run(tmp_path, True, 4, resume=str(tmp_path / "checkpoint-2"), callback=False)
