"""engram.attach: a memory in decoder models of transformers, tiny random ones of every kind."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import transformers as hf
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.models.xlstm.modeling_xlstm import xLSTMCache as XLSTMCache

import engram
from engram import EngramConfig, TokenMap, build_optimizer
from engram.integrations.transformers.decoding import cache_argument
from engram.integrations.transformers.inputs import placeholder_ids
from tests.hf_models import CACHE, CONFIGS, IMAGE, VOCAB, build, text

ALL = list(CONFIGS)
TEXT = [name for name in ALL if name != "gemma3_images"]
ZERO = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101)
FULL = ZERO.replace(table_init="normal", conv_init="uniform")  # rows and convolution that say something from the start
IDENTITY = TokenMap.identity(VOCAB)


def attached(name: str, config: EngramConfig = FULL) -> tuple[hf.PreTrainedModel, engram.EngramMemory]:
    model = build(name)
    torch.manual_seed(1)
    return model, engram.attach(model, config, IDENTITY)


def loss_of(model, ids, **more):
    return model(input_ids=ids, labels=ids, **more).loss


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_with_zero_rows_step_0_logits_are_those_of_the_model_alone(name):
    plain = build(name)(text()).logits
    assert torch.equal(attached(name, ZERO)[0](text()).logits, plain)
    assert not torch.equal(attached(name)[0](text()).logits, plain)


@pytest.mark.parametrize("name", ALL)
def test_training_only_the_memory_memorises_a_text(name):
    model, memory = attached(name, ZERO)
    model.train().requires_grad_(False)
    memory.requires_grad_(True)
    optimizer = build_optimizer(model, lr=0.01, table_lr=0.1)
    ids, losses = text(), []
    more = {"token_type_ids": torch.zeros_like(ids)} if name == "gemma3_images" else {}
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of(model, ids, **more)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.25


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(name):
    model, _ = attached(name)
    ids = text(time=24)
    full = model(ids).logits
    cache, steps = hf.DynamicCache(config=model.config), []
    for piece in ids.split([5, 1, 1, 9, 1, 7], dim=1):
        steps.append(model(piece, **{CACHE: cache}).logits)
    close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_cache_that_the_model_made_itself_continues_the_text(name):
    model, _ = attached(name)
    ids = text()
    full = model(ids, use_cache=False).logits
    out = model(ids[:, :7], use_cache=True)
    close(model(ids[:, 7:], **{CACHE: out[CACHE]}).logits, full[:, 7:])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_left_padding_equals_no_padding(name):
    model, memory = attached(name)
    ids, pad = text(), 5
    seen = []
    recall = memory.recall
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    alone = model(ids).logits
    padded = torch.cat([torch.full((2, pad), 9), ids], dim=1)  # 9 is an ordinary token: only the mask says padding
    mask = torch.ones_like(padded).index_fill(1, torch.arange(pad), 0)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=places).logits[:, pad:]
    for layer in FULL.layers:
        assert torch.equal(seen[1].row_ids[layer][:, pad:], seen[0].row_ids[layer])
    if name != "deepseek_v4":  # which by itself counts padding in the blocks that it compresses
        close(logits, alone)


@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_padding_gets_nothing_and_moves_no_row(name):
    model, memory = attached(name)
    model.train()
    hidden = torch.randn(2, 12, 4, 32) if memory.streams == 4 else torch.randn(2, 12, 32)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    recall = memory.recall(text(), dead=~mask)
    update = memory[0](hidden, recall)
    assert not update[0, :4].any() and update[0, 4:].any()
    loss_of(model, text(), attention_mask=mask.long()).backward()
    [(rows, gradient)] = memory.gradients[0]
    assert torch.equal(rows, recall.row_ids[0][mask]) and gradient.shape == (20, 4, 8)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "deepseek_v4"])
def test_generate_with_a_cache_equals_generate_without(name):
    model, _ = attached(name)
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = text(time=6)
    assert torch.equal(model.generate(ids, use_cache=True, **kwargs), model.generate(ids, use_cache=False, **kwargs))


@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_beam_search_reorders_the_state_of_the_memory(name):
    model, _ = attached(name)
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    kwargs |= {"output_scores": True, "return_dict_in_generate": True}
    ids = text(time=6)
    cached, whole = (model.generate(ids, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    close(cached.sequences_scores, whole.sequences_scores)
    assert not torch.equal(cached.beam_indices[:, :8], cached.beam_indices[:, :1].expand(-1, 8))  # beams did change


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])  # full, both and only sliding attention
def test_a_static_cache_and_left_padding_generate_what_each_text_generates_alone(name):
    model, memory = attached(name)
    seen, recall = [], memory.recall
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    short, long = text(1, 5, seed=3), text(1, 9, seed=4)
    padded = torch.cat([torch.nn.functional.pad(short, (4, 0), value=9), long])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    for implementation in ("dynamic", "static"):
        seen.clear()
        both = model.generate(padded, attention_mask=mask, cache_implementation=implementation, **kwargs)
        assert torch.equal(seen[0].dead, mask == 0) and all(step.dead is None for step in seen[1:])
        assert torch.equal(both[:1, 9:], model.generate(short, **kwargs)[:, 5:]), implementation
        assert torch.equal(both[1:, 9:], model.generate(long, **kwargs)[:, 9:]), implementation


def test_rejected_drafts_of_assisted_decoding_leave_no_trace():
    model, _ = attached("llama")
    ids = text(1, 4).repeat(1, 4)  # a text that repeats itself, so that looking drafts up in the prompt finds some
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    crops = []
    original = hf.DynamicCache.crop
    hf.DynamicCache.crop = lambda self, n: crops.append(n) or original(self, n)
    try:
        drafted = model.generate(ids, prompt_lookup_num_tokens=3, **kwargs)
    finally:
        hf.DynamicCache.crop = original
    assert torch.equal(drafted, model.generate(ids, **kwargs)) and min(crops) < 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_a_cache_can_be_copied_repeated_selected_and_cleared(copied):
    model, _ = attached("llama")
    ids = text(time=10)
    full = model(ids).logits
    cache = hf.DynamicCache(config=model.config)
    model(ids[:, :6], **{CACHE: cache})
    twin = copied(cache)
    twin.batch_repeat_interleave(2)
    twin.batch_select_indices(torch.tensor([3, 0]))
    close(model(ids[[1, 0], 6:], **{CACHE: twin}).logits, full[[1, 0], 6:])
    close(model(ids[:, 6:], **{CACHE: cache}).logits, full[:, 6:])
    cache.crop(-4)
    close(model(ids[:, 6:], **{CACHE: cache}).logits, full[:, 6:])
    cache.reset()
    close(model(ids, **{CACHE: cache}).logits, full)


@torch.no_grad()
def test_a_cache_that_the_memory_has_not_followed_is_refused():
    model, ids = build("llama"), text()
    before = model(ids, use_cache=True)[CACHE]
    memory = engram.attach(model, FULL, IDENTITY)
    with pytest.raises(ValueError, match="holds 12 positions that this memory has not seen"):
        model(ids, **{CACHE: before})
    changed = model(ids, use_cache=True)[CACHE]
    for layer in changed.layers:
        layer.crop(-2)
    with pytest.raises(ValueError, match="holds 10 positions, the memory has seen 12"):
        model(ids, **{CACHE: changed})
    followed = model(ids, use_cache=True)[CACHE]
    memory.detach()
    engram.attach(model, FULL, IDENTITY)
    with pytest.raises(ValueError, match="holds 12 positions that this memory has not seen"):
        model(ids, **{CACHE: followed})


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
@torch.no_grad()
def test_packed_documents_give_what_each_gives_alone(name):
    model, _ = attached(name)
    ids = text(time=20)
    places = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    packed = model(ids, position_ids=places, use_cache=False).logits
    close(packed[:, :8], model(ids[:, :8]).logits)
    close(packed[:, 8:], model(ids[:, 8:]).logits)


def test_without_transformers_the_error_names_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import engram; engram.attach"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1 and "pip install -e '.[hf]'" in ran.stderr


def test_detach_returns_the_unchanged_model():
    model = build("gemma3_images")
    before, ids = set(model.state_dict()), text()
    plain = model(ids).logits
    memory = engram.attach(model, FULL, IDENTITY)
    assert set(model.state_dict()) > before
    assert memory.detach() is model
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in model.modules())
    assert not any(hasattr(m, "engram") for m in model.modules())
    assert set(model.state_dict()) == before and torch.equal(model(ids).logits, plain)
    with pytest.raises(ValueError, match="not attached"):
        memory.detach()
    assert engram.attach(model, memory) is memory and engram.detach(model) is memory
    with pytest.raises(ValueError, match="no attached memory"):
        engram.detach(model)


def test_a_saved_memory_attaches_as_an_adapter(tmp_path):
    model, memory = attached("llama")
    logits = model(text()).logits
    memory.save(tmp_path / "adapter")
    other = build("llama")
    engram.attach(other, tmp_path / "adapter", IDENTITY)
    assert torch.equal(other(text()).logits, logits)
    with pytest.raises(ValueError, match="another tokenizer or version"):
        engram.attach(build("llama"), tmp_path / "adapter", TokenMap.identity(VOCAB - 1))
    with pytest.raises(ValueError, match="another tokenizer or version"):
        memory.detach()
        engram.attach(model, memory, TokenMap.identity(VOCAB - 1))


def test_a_model_saved_with_its_memory_loads_completely(tmp_path):
    model, memory = attached("mixtral")
    memory.tables[0].write(torch.tensor([7]), torch.full((1, 8), 3.0))
    model.save_pretrained(tmp_path / "model")
    other = engram.from_pretrained(tmp_path / "model", IDENTITY)
    assert torch.equal(other(text()).logits, model(text()).logits)
    third = build("mixtral")
    engram.attach(third, FULL, IDENTITY)
    third.load_state_dict(model.state_dict())
    assert torch.equal(third(text()).logits, model(text()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v4"])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    results = []
    for checkpointed in (False, True):
        model, memory = attached(name)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)  # of the dropout
        loss_of(model, text()).backward()
        assert all(len(pending) == 1 for pending in memory.gradients.values())
        rows = [pending[0][1] for pending in memory.gradients.values()]
        results.append(rows + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["llama", "deepseek_v4", "gemma3_images"])
def test_a_bfloat16_model_keeps_its_dtype(name):
    model = build(name).to(torch.bfloat16)
    plain = model(text()).logits
    memory = engram.attach(model, ZERO, IDENTITY)
    weights = {p.dtype for name, p in memory.named_parameters() if not name.endswith("_norm")}
    assert weights == {torch.bfloat16}  # gains of 1 would not move there
    assert torch.equal(model(text()).logits, plain) and plain.dtype == torch.bfloat16
    full, _ = attached(name)
    logits = full(text()).logits
    assert (full.to(torch.bfloat16)(text()).logits.float() - logits).abs().max() < 0.1


def test_a_compiled_model_gives_the_same_logits_and_row_gradients():
    model, memory = attached("llama")
    model.train()
    compiled = torch.compile(model, backend="eager")
    results = []
    for m in (model, compiled):
        for ids in (text(), text(seed=5)):  # the second batch must not be read with the ids of the first
            out = m(input_ids=ids, labels=ids)
            out.loss.backward()
            [(rows, gradient)] = memory.gradients[2]
            results.append((out.logits, rows, gradient))
            memory.gradients[0].clear(), memory.gradients[2].clear()
    for eager, fast in zip(results[:2], results[2:], strict=True):
        for a, b in zip(eager, fast, strict=True):
            close(a, b)


def test_layers_that_accelerate_keeps_on_disk_get_their_memory(tmp_path):
    from accelerate import disk_offload

    plain = attached("llama")[0](text()).logits
    model = build("llama")
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    torch.manual_seed(1)
    engram.attach(model, FULL, IDENTITY)
    close(model(text()).logits, plain)


@pytest.mark.parametrize("first", ["lora", "memory"])
def test_lora_and_the_memory_train_together(first):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = build("llama")
    if first == "lora":
        model = get_peft_model(model, lora)
        memory = engram.attach(model, ZERO, IDENTITY)
    else:
        memory = engram.attach(model, ZERO, IDENTITY)
        model = get_peft_model(model, lora)  # freezes all it finds
        memory.requires_grad_(True)
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.01, table_lr=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, text())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert losses[-1] < losses[0] - 0.1 and optimizer.touched
    assert any("lora" in n for n in moved) and any("engram" in n for n in moved)
    assert all("lora" in n or "engram" in n for n in moved)


def test_a_memory_whose_weights_peft_has_wrapped_is_not_saved_to_a_folder_that_cannot_be_loaded(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, memory = attached("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(ValueError, match=r"key\.base_layer.*merge_and_unload"):
        memory.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    logits = wrapped.merge_and_unload()(text()).logits
    memory.save(tmp_path / "adapter")
    memory.detach()
    engram.attach(model, tmp_path / "adapter", IDENTITY)
    close(model(text()).logits, logits)


def test_the_trainer_trains_saves_and_resumes_the_memory(tmp_path):
    def train(resume: bool) -> tuple[hf.Trainer, engram.EngramMemory]:
        model, memory = attached("llama", ZERO)
        optimizer = build_optimizer(model, lr=0.003, table_lr=0.05)
        data = [{"input_ids": row, "labels": row} for row in text(16)]
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, logging_steps=3, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return trainer, memory

    trainer, memory = train(resume=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0] and memory.tables[0].tensor.any()
    _, resumed = train(resume=True)
    for layer in ZERO.layers:
        assert torch.equal(resumed.tables[layer].tensor, memory.tables[layer].tensor)


@torch.no_grad()
def test_image_positions_are_never_hashed_and_get_nothing():
    model, memory = attached("gemma3_images")
    ids = text(1, 14)
    ids[:, 4:8] = IMAGE
    pixels, kinds = torch.randn(1, 3, 16, 16), (ids == IMAGE).long()
    seen, updates = [], []
    recall, fusion = memory.recall, memory.fusions["2"]
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    fusion.register_forward_hook(lambda module, args, out: updates.append(out[0]))
    full = model(ids, pixel_values=pixels, token_type_ids=kinds).logits
    assert not updates[0][:, 4:8].any() and updates[0][:, 8:].any(dim=-1).all()
    for part in (slice(0, 4), slice(8, 14)):  # as if each piece of text stood alone
        assert torch.equal(seen[0].row_ids[2][:, part], recall(ids[:, part]).row_ids[2])
    out = model(ids[:, :9], pixel_values=pixels, token_type_ids=kinds[:, :9], use_cache=True)
    close(model(ids[:, 9:], **{CACHE: out[CACHE]}).logits, full[:, 9:])


def test_the_hooks_read_positional_arguments_as_well():
    model, _ = attached("llama")
    mask = torch.ones(2, 12, dtype=torch.long).index_fill(1, torch.arange(3), 0)
    assert torch.equal(model(text(), mask).logits, model(input_ids=text(), attention_mask=mask).logits)
    assert not torch.equal(model(text(), mask).logits, model(text()).logits)


def test_embeddings_without_ids_are_refused_and_ids_pass_again():
    model, _ = attached("llama")
    logits = model(text()).logits
    with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(text()))
    assert torch.equal(model(text()).logits, logits)


def test_a_forward_pass_that_raised_leaves_no_ids_behind():
    model, _ = attached("llama")

    def fail(*args):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(text())
    handle.remove()
    with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
        model.model(inputs_embeds=model.get_input_embeddings()(text()))


def ended_by(module, error, run) -> None:
    """Call run() while the forward pass of a module raises."""

    def fail(*args):
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)):
            run()
    finally:
        handle.remove()


def parts(model) -> dict[str, torch.nn.Module]:
    layers = model.model.layers
    return {
        "embedding": model.get_input_embeddings(),
        "first layer": layers[0],
        "inside a layer": layers[1].mlp,
        "last layer": layers[2],
        "norm": model.model.norm,
        "head": model.lm_head,
    }


@pytest.mark.parametrize("where", ["embedding", "first layer", "inside a layer", "last layer", "norm", "head"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), SystemExit(1), RuntimeError("no memory left")])
@torch.no_grad()
def test_no_state_of_a_forward_pass_remains_whatever_ended_it(where, error):
    model, _ = attached("llama")
    ids, more = (
        text(),
        {"attention_mask": torch.tensor([[0] * 8 + [1] * 4] * 2), "position_ids": torch.arange(12)[None]},
    )
    hidden, logits = model.model(ids).last_hidden_state, model(ids, use_cache=False).logits
    longer = model.model(text(1, 20)).last_hidden_state
    for called in (model, model.model)[: 1 if where == "head" else 2]:
        ended_by(parts(model)[where], error, lambda called=called: called(ids, **more))
        with pytest.raises(RuntimeError, match="outside a forward pass"):
            model.model.layers[0](torch.zeros(2, 12, 32))
        assert torch.equal(model.model(ids).last_hidden_state, hidden)
        assert torch.equal(model.model(text(1, 20)).last_hidden_state, longer)
        assert torch.equal(model(ids, use_cache=False).logits, logits)
        ended_by(parts(model)[where], error, lambda called=called: called(ids, **more))
        with pytest.raises(ValueError, match="inputs_embeds without input_ids"):
            model.model(inputs_embeds=model.get_input_embeddings()(ids))


@torch.no_grad()
def test_an_interrupted_pass_in_another_thread_does_not_affect_this_one():
    model, _ = attached("llama")
    ids, mask = text(), torch.tensor([[0] * 8 + [1] * 4] * 2)
    want, found = model.model(ids).last_hidden_state, []

    def interrupted():
        ended_by(model.model.layers[2], KeyboardInterrupt(), lambda: model(ids, attention_mask=mask))
        found.append(model.model(ids).last_hidden_state)

    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()
    found.append(model.model(ids).last_hidden_state)
    assert len(found) == 2 and all(torch.equal(hidden, want) for hidden in found)


@torch.no_grad()
def test_a_generate_that_was_interrupted_changes_nothing_that_follows():
    model, _ = attached("llama")
    ids, steps = text(time=6), []
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want, hidden = model.generate(ids, **kwargs), model.model(ids).last_hidden_state

    def stop(*args):
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    handle.remove()
    assert torch.equal(model.model(ids).last_hidden_state, hidden)
    assert torch.equal(model.generate(ids, **kwargs), want)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory left")])
@torch.no_grad()
def test_a_cache_that_an_interrupted_pass_filled_in_part_is_refused(error):
    model, _ = attached("llama")
    ids = text()
    full, cache = model(ids).logits, hf.DynamicCache(config=model.config)
    model(ids[:, :5], **{CACHE: cache})
    ended_by(model.model.layers[1], error, lambda: model(ids[:, 5:8], **{CACHE: cache}))
    assert cache.get_seq_length() == 8  # of the first layer, the others hold 5
    with pytest.raises(ValueError, match="was interrupted"):
        model(ids[:, 8:], **{CACHE: cache})
    cache.reset()
    close(model(ids, **{CACHE: cache}).logits, full)
    ended_by(model.lm_head, error, lambda: model(text(2, 3), **{CACHE: cache}))  # after all layers: it is whole
    cache.crop(-3)
    close(model(ids[:, :1], **{CACHE: cache}).logits, model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


@torch.no_grad()
def test_a_forward_pass_within_another_reads_its_own_rows():
    model, _ = attached("llama")
    ids, other = text(), text(seed=5)
    want, within, found = model(ids).logits, model(other, use_cache=False).logits, []

    def run_another(*args):
        if not found:
            found.append(None)
            found[0] = model(other, use_cache=False).logits

    handle = model.model.layers[1].register_forward_pre_hook(run_another)
    assert torch.equal(model(ids).logits, want) and torch.equal(found[0], within)
    handle.remove()


@torch.no_grad()
def test_a_compiled_pass_that_failed_leaves_nothing_behind():
    model, _ = attached("llama")
    ids, mask = text(), torch.tensor([[0] * 8 + [1] * 4] * 2)
    hidden = model.model(ids).last_hidden_state
    compiled = torch.compile(model, backend="eager")
    for error in (KeyboardInterrupt(), RuntimeError("no memory left")):
        ended_by(model.model.layers[1], error, lambda: compiled(ids, attention_mask=mask))
        close(model.model(ids).last_hidden_state, hidden)


def test_a_model_in_eval_mode_gets_a_memory_in_eval_mode():
    model, memory = attached("llama")
    loss_of(model, text()).backward()
    assert not memory.training and not any(memory.gradients.values())
    assert model.train() and memory.training


def test_a_copy_of_the_model_is_refused():
    model, _ = attached("llama")
    with pytest.raises(RuntimeError, match="this LlamaModel is a copy"):
        copy.copy(model.model)(text())


def test_two_threads_that_run_one_model_read_their_own_rows():
    model, _ = attached("llama")
    ids, inside, gone_on = text(), threading.Event(), threading.Event()
    want = model(ids).logits

    def wait(*args):
        if threading.current_thread() is thread:
            inside.set()
            gone_on.wait(5)

    model.model.layers[0].register_forward_hook(wait)  # after the memory of layer 0, before that of layer 2
    found = []
    thread = threading.Thread(target=lambda: found.append(model(ids).logits))
    thread.start()
    assert inside.wait(5)
    model(text(seed=5))
    gone_on.set()
    thread.join()
    assert torch.equal(found[0], want)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_another_kind_is_refused_whatever_its_argument_is_called(name):
    model, _ = attached("llama")  # generate_batch packs the next token of many requests into one row of each step
    places = torch.tensor([[5, 3, 8]])
    paged = object.__new__(PagedAttentionCache)
    with pytest.raises(ValueError, match=r"is a PagedAttentionCache.*paged cache.*call generate\(\)"):
        model(text(1, 3), position_ids=places, **{name: paged})
    with pytest.raises(ValueError, match=r"is a object: expected a Cache of transformers"):
        model(text(1, 3), position_ids=places, **{name: object()})
    with pytest.raises(TypeError, match="is a tuple"):
        model(text(1, 3), position_ids=places, **{name: ((torch.zeros(1), torch.zeros(1)),)})


def test_generate_batch_is_refused_with_the_reason():
    model, _ = attached("llama")
    model.set_attn_implementation("paged|eager")
    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(ValueError, match="paged cache of generate_batch"):
        model(input_ids=text(1, 3), position_ids=torch.tensor([[5, 3, 8]]), cache=cache, use_cache=False)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_followed_by_whichever_name_forward_accepts(name):
    """The cache is followed under the name in the signature and under older names that forward() renames."""
    model, _ = attached("llama")
    if name not in inspect.signature(hf.LlamaModel.forward).parameters and CACHE != "cache":
        pytest.skip("this version of transformers has not heard of `cache`")
    ids, cache = text(), hf.DynamicCache(config=model.config)
    full = model(ids).logits
    pieces = [model(piece, **{name: cache}).logits for piece in ids.split([5, 1, 6], dim=1)]
    close(torch.cat(pieces, dim=1), full)
    decoder = hf.DynamicCache(config=model.config)  # the decoder alone, which a caller may run as well
    hidden = [model.model(piece, **{name: decoder}).last_hidden_state for piece in ids.split([5, 1, 6], dim=1)]
    close(model.lm_head(torch.cat(hidden, dim=1)), full)


def test_the_cache_argument_is_found_by_its_annotation():
    def module(**annotations):
        def forward(self, *args): ...

        kinds = {"self": inspect.Parameter.empty, "input_ids": torch.Tensor, **annotations}
        named = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for n, a in kinds.items()]
        forward.__signature__ = inspect.Signature(named)
        return type("Module", (torch.nn.Module,), {"forward": forward})()

    empty, tuples = inspect.Parameter.empty, tuple[tuple[torch.Tensor]] | None
    assert cache_argument(module(cache=empty, kv=hf.Cache | None)) == "kv"
    assert cache_argument(module(kv=hf.DynamicCache)) == "kv"
    assert cache_argument(module(kv="Optional[hf.DynamicCache]")) == "kv"
    assert cache_argument(module(cache_params="hf.Cache | None")) == "cache_params"
    for older in (empty, tuples, "tuple[tuple[torch.Tensor]] | None"):
        assert cache_argument(module(past_key_values=older)) == "past_key_values"
    for foreign in (XLSTMCache, XLSTMCache | None, "XLSTMCache | None"):
        assert cache_argument(module(cache_params=foreign)) is None
    assert cache_argument(module(state=list[torch.Tensor] | None)) is None
    assert cache_argument(build("llama").model) == CACHE


STATES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba", "Rwkv", "xLSTM"])
def test_a_model_that_keeps_its_state_out_of_the_cache_is_refused(kind):
    config = getattr(hf, f"{kind}Config")(**STATES | ({"num_heads": 4, "head_dim": 16} if kind == "Mamba2" else {}))
    with pytest.raises(ValueError, match=f"{kind}Model keeps what it has decoded elsewhere"):
        engram.attach(getattr(hf, f"{kind}ForCausalLM")(config), ZERO, IDENTITY)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_a_block_diagonal_mask_separates_documents(dtype):
    model, _ = attached("llama")
    ids, numbers = text(time=12), torch.tensor([0] * 5 + [1] * 7)
    seen = (numbers[:, None] == numbers) & torch.ones(12, 12).tril().bool()
    mask = seen if dtype == torch.bool else torch.zeros(12, 12).masked_fill(~seen, torch.finfo(dtype).min)
    packed = model(ids, attention_mask=mask.expand(2, 1, -1, -1)).logits
    close(packed[:, :5], model(ids[:, :5]).logits)
    close(packed[:, 5:], model(ids[:, 5:]).logits)


@torch.no_grad()
def test_a_mask_of_a_tree_of_drafts_is_refused():
    model, _ = attached("llama")
    cache = hf.DynamicCache(config=model.config)
    model(text(1, 4), **{CACHE: cache})
    seen = torch.ones(1, 1, 3, 7).tril(4).bool()
    model(text(1, 3), attention_mask=seen, **{CACHE: copy.deepcopy(cache)})  # one branch
    seen[..., 2, 5] = False  # the third token is the second's sibling
    with pytest.raises(ValueError, match="not to the one directly before it"):
        model(text(1, 3), attention_mask=seen, **{CACHE: cache})


@torch.no_grad()
def test_cumulative_lengths_separate_documents_whatever_the_position_ids():
    model, memory = attached("llama")
    seen, recall = [], memory.recall
    memory.recall = lambda *args, **kwargs: seen.append(recall(*args, **kwargs)) or seen[-1]
    ids = text(1)
    for places in (None, torch.arange(12)[None]):
        model(ids, cu_seq_lens_q=torch.tensor([0, 5, 12]), position_ids=places)
        assert torch.equal(seen[-1].row_ids[0][:, 5:], recall(ids[:, 5:]).row_ids[0])
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 11"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 5, 11]))


def test_placeholders_are_found_in_the_parts_of_a_configuration():
    assert placeholder_ids(hf.Phi4MultimodalConfig()) == (200010, 200011)
    assert placeholder_ids(CONFIGS["gemma3_images"]()) == (IMAGE,)
    assert placeholder_ids(CONFIGS["llama"]()) == ()


def test_the_error_for_an_unknown_architecture_names_the_expected_attributes():
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=2))
    with pytest.raises(ValueError, match=r"architecture of T5ForConditionalGeneration.*named layers, h, blocks.*block"):
        engram.attach(t5, ZERO, IDENTITY)
    with pytest.raises(ValueError, match="holds no PreTrainedModel"):
        engram.attach(torch.nn.Linear(2, 2), ZERO, IDENTITY)


def test_attaching_a_memory_that_does_not_fit_is_refused():
    model, memory = attached("llama")
    with pytest.raises(ValueError, match="has a memory already"):
        engram.attach(model, ZERO, IDENTITY)
    with pytest.raises(ValueError, match="attached to a model already"):
        engram.attach(build("llama"), memory)
    with pytest.raises(ValueError, match=r"memory layers \(3,\) are out of range: the model has layers 0\.\.2"):
        engram.attach(build("llama"), ZERO.replace(layers=(3,)), IDENTITY)
    with pytest.raises(ValueError, match="inject='values'"):
        engram.attach(build("llama"), ZERO.replace(inject="values"), IDENTITY)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        engram.attach(build("llama"), ZERO)
    with pytest.raises(ValueError, match="1 streams x 16"):
        engram.attach(build("llama"), engram.EngramMemory(ZERO, IDENTITY, 16))
    with pytest.raises(ValueError, match=r"1 streams x 32.*4 streams x 32"):
        engram.attach(build("deepseek_v4"), engram.EngramMemory(ZERO, IDENTITY, 32))


def test_a_refused_attach_leaves_the_model_unchanged():
    model = build("llama")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="compressed ids"):
        engram.attach(model, ZERO.replace(compressed_vocab=7), IDENTITY)
    assert set(model.state_dict()) == before and not any(m._forward_pre_hooks for m in model.modules())


def test_importing_engram_does_not_import_transformers():
    code = "import sys, engram; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("how", ["method", "wrapped"])
def test_a_model_that_was_compiled_and_has_run_gets_its_memory(how):
    model, ids = build("llama").eval(), text()
    compiled = model
    if how == "method":
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(ids).logits
        engram.attach(model, FULL, IDENTITY)
        found = compiled(ids).logits
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(found, model(ids).logits)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "deepseek_v3"])
@torch.no_grad()
def test_a_mask_with_room_for_later_positions_is_read_from_its_start(name):
    model, ids = attached(name)[0].eval(), text(2, 9)
    expected = model(ids).logits
    mask = torch.zeros(2, 30, dtype=torch.long)
    mask[:, :9] = 1
    close(model(ids, attention_mask=mask, **{CACHE: hf.DynamicCache(config=model.config)}).logits, expected)
    cache, pieces = hf.StaticCache(config=model.config, max_cache_len=20), []
    for t in range(9):
        seen = torch.zeros(2, 20, dtype=torch.long)
        seen[:, : t + 1] = 1
        position = torch.tensor([[t]])
        pieces.append(model(ids[:, t : t + 1], attention_mask=seen, position_ids=position, **{CACHE: cache}).logits)
    close(torch.cat(pieces, dim=1), expected)


def test_the_error_for_attaching_twice_names_what_to_do_next():
    """Imitate a notebook whose cells run twice: the one that attaches, the one that makes the memory, or both."""
    model, memory = attached("llama")
    for again in (FULL, memory, engram.EngramMemory(FULL, IDENTITY, 32)):
        with pytest.raises(ValueError, match=r"continue with it, or call engram.detach\(model\) and attach again"):
            engram.attach(model, again, IDENTITY)
    with pytest.raises(ValueError, match=r"call memory.detach\(\), then attach it again"):
        engram.attach(build("llama"), memory, IDENTITY)
    logits = model(text()).logits
    engram.detach(model)
    engram.attach(model, memory, IDENTITY)
    assert torch.equal(model(text()).logits, logits)


def test_attach_draws_no_random_number_of_the_model_and_leaves_no_hook():
    """attach runs the model up to its first layer, where the dropout of gpt2 would draw."""
    kept = engram.EngramMemory(FULL, IDENTITY, 32)
    for name in ("gpt2", "llama"):
        model = build(name).train()
        state = torch.random.get_rng_state()
        engram.attach(model, kept)
        assert torch.equal(torch.random.get_rng_state(), state)
        kept.detach()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("streams", [2, 3])
def test_streams_in_an_axis_of_their_own_are_refused_at_attach(streams):
    sizes = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8}
    sizes |= {"num_hidden_layers": 4, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": streams}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    model = hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**sizes))
    with pytest.raises(ValueError, match=rf"Gemma3nTextModel pass hidden states \[{streams}, 1, 2, 32\].*\(AltUp\)"):
        engram.attach(model, FULL, IDENTITY)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("change", ["narrower", "more streams", "more sequences"])
def test_layers_that_return_something_other_than_a_hidden_state_are_refused_at_attach(change):
    """The input of the first layer decides, not the name of the class."""
    model = build("llama")
    changes = {
        "narrower": lambda x: x[..., :16],
        "more streams": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1),
        "more sequences": lambda x: x.repeat(2, 1, 1),
    }
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: changes[change](out))
    with pytest.raises(ValueError, match="the layers of LlamaModel pass hidden states"):
        engram.attach(model, FULL, IDENTITY)
