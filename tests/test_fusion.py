"""The module around the rows, against golden numbers and a naive transcription."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engram.config import EngramConfig
from engram.fusion import EngramFusion

GOLDEN = json.loads((Path(__file__).parent / "golden" / "fusion.json").read_text())


def fill(shape, a):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * a).view(shape)


def golden_fusion() -> EngramFusion:
    config = EngramConfig(
        orders=(2, 3), heads=1, head_dim=3, bias=True, gate_eps=None, conv_eps=1e-5, conv_kernel=4, conv_dilation=3
    )
    fusion = EngramFusion(config, hidden_size=4, streams=2).double()
    with torch.no_grad():
        fusion.value.weight.copy_(fill([4, 6], 0.71))
        fusion.value.bias.copy_(fill([4], 0.11))
        fusion.key.weight.copy_(torch.cat([fill([4, 6], 0.91 + 0.1 * m) for m in range(2)]))
        fusion.key.bias.copy_(torch.cat([fill([4], 0.13 + 0.1 * m) for m in range(2)]))
        for m in range(2):
            fusion.key_norm[m] = 1 + 0.1 * m
            fusion.query_norm[m] = 1 - 0.1 * m
            fusion.conv_norm[m] = 1 + m
        fusion.conv_weight.copy_(fill([8, 1, 4], 0.29))
    return fusion


def test_gate_and_output_equal_the_golden_numbers_in_float64():
    fusion, rows, hidden = golden_fusion(), fill([1, 7, 6], 0.37), fill([1, 7, 2, 4], 0.53)
    gates = torch.tensor(GOLDEN["gates"], dtype=torch.float64)
    torch.testing.assert_close(fusion.gate(rows, hidden)[0], gates, rtol=0, atol=1e-12)
    output = torch.tensor(GOLDEN["output"], dtype=torch.float64)
    torch.testing.assert_close(fusion(rows, hidden)[0][0], output, rtol=0, atol=1e-12)


def make(streams: int = 1, **changes) -> EngramFusion:
    torch.manual_seed(0)
    config = EngramConfig(heads=2, head_dim=5, conv_init="uniform").replace(**changes)
    return EngramFusion(config, hidden_size=12, streams=streams)


def inputs(fusion: EngramFusion, T: int = 20):
    generator = torch.Generator().manual_seed(1)
    shape = (3, T, 12) if fusion.streams == 1 else (3, T, fusion.streams, 12)
    return torch.randn(3, T, fusion.config.d_mem, generator=generator), torch.randn(shape, generator=generator)


def test_convolution_equals_torch_conv1d_with_dilation():
    fusion = make(streams=2)
    x = torch.randn(3, 20, 24)
    padded = F.pad(x.transpose(1, 2), (9, 0))
    expected = F.conv1d(padded, fusion.conv_weight, groups=24, dilation=3).transpose(1, 2)
    torch.testing.assert_close(fusion._conv(x, None, None), expected)


def test_convolution_has_its_norm_before_it():
    fusion = make()
    rows, hidden = inputs(fusion)
    one = fusion(rows, hidden)[0]
    with torch.no_grad():
        fusion.value.weight.mul_(100)  # 100 u: the normalised convolution does not change, the rest grows
    big = fusion(rows, hidden)[0]
    u = fusion.gate(rows, hidden.unsqueeze(2)) * F.linear(rows, fusion.value.weight)
    torch.testing.assert_close(big - u, one - u / 100, rtol=1e-4, atol=1e-4)


def test_convolution_of_a_packed_batch_never_crosses_a_document():
    fusion = make()
    rows, hidden = inputs(fusion)
    documents = torch.tensor([[0] * 7 + [1] * 13]).expand(3, 20)
    packed = fusion(rows, hidden, documents)[0]
    torch.testing.assert_close(packed[:, 7:], fusion(rows[:, 7:], hidden[:, 7:])[0])
    torch.testing.assert_close(packed[:, :7], fusion(rows[:, :7], hidden[:, :7])[0])


@pytest.mark.parametrize("streams", [1, 4])
def test_decoding_step_by_step_equals_the_full_forward(streams):
    fusion = make(streams=streams)
    rows, hidden = inputs(fusion)
    full = fusion(rows, hidden)[0]
    history, steps = torch.zeros(3, 0, streams * 12), []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 19), slice(19, 20)):
        update, new = fusion(rows[:, piece], hidden[:, piece], None, history)
        history = torch.cat([history, new], dim=1)
        steps.append(update)
    torch.testing.assert_close(torch.cat(steps, dim=1), full)


def test_output_never_depends_on_later_positions():
    fusion = make()
    rows, hidden = inputs(fusion)
    rows.requires_grad_()
    fusion(rows, hidden)[0][:, 9].sum().backward()
    assert rows.grad[:, 10:].count_nonzero() == 0 and rows.grad[:, 9].count_nonzero() > 0


def test_zero_rows_add_nothing_even_with_a_live_convolution():
    fusion = make(streams=2)
    _, hidden = inputs(fusion)
    assert fusion(torch.zeros(3, 20, fusion.config.d_mem), hidden)[0].count_nonzero() == 0


def test_zero_initialised_convolution_starts_as_gate_times_value():
    fusion = make(conv_init="zero")
    rows, hidden = inputs(fusion)
    u = fusion.gate(rows, hidden.unsqueeze(2)) * fusion.value(rows)
    torch.testing.assert_close(fusion(rows, hidden)[0], u)


def test_gate_is_float32_under_bfloat16_autocast():
    fusion = make()
    rows, hidden = inputs(fusion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate = fusion.gate(rows, hidden.unsqueeze(2))
        update = fusion(rows, hidden)[0]
    assert gate.dtype == torch.float32
    torch.testing.assert_close(update.float(), fusion(rows, hidden)[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("gate", ["signed_sqrt", "plain", "none"])
def test_gate_variants_follow_their_formulas(gate):
    fusion = make(gate=gate, conv_kernel=0)
    rows, hidden = inputs(fusion)
    value = fusion.value(rows)
    if gate == "none":
        expected = torch.ones(3, 20, 1)
        assert not hasattr(fusion, "key")
    else:
        key, query = (F.rms_norm(x, (12,), eps=1e-6) for x in (fusion.key(rows), hidden))
        s = (key * query).sum(-1, keepdim=True) / 12**0.5
        expected = torch.sigmoid(s if gate == "plain" else s.sign() * s.abs().clamp_min(1e-6).sqrt())
    torch.testing.assert_close(fusion(rows, hidden)[0], expected * value)


def test_biases_exist_only_where_asked():
    assert make(bias=True).value.bias is not None and make(bias=False).key.bias is None


def test_rows_of_other_positions_are_refused():
    fusion = EngramFusion(EngramConfig(layers=(1,), heads=1, head_dim=2, rows_per_head=7), 8)  # d_mem 4
    for shape in ((1, 1, 8), (3, 5, 8)):
        with pytest.raises(ValueError, match=r"the rows have \[1, 5\] positions"):
            fusion(torch.zeros(1, 5, 8), torch.zeros(shape))


def test_a_hidden_state_of_another_width_is_refused():
    fusion = make()
    rows, _ = inputs(fusion)
    with pytest.raises(ValueError, match="does not fit a fusion of 1 streams x 12"):
        fusion(rows, torch.zeros(3, 20, 13))
