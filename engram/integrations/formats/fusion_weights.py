"""The fusion weights of a layer in a released checkpoint, read as float32 under the names of EngramFusion."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.config import EngramConfig
from engram.fusion import EngramFusion
from engram.integrations.formats.dialects import fusion_from, fusion_to
from engram.integrations.formats.safetensors_io import Checkpoint
from engram.integrations.formats.scales import SCALES, scale_of


def read_fusion(
    kind: str, config: EngramConfig, checkpoint: Checkpoint, prefix: str
) -> tuple[dict[str, Tensor], int, int]:
    """Return the fusion weights of the layer whose tensors begin with `prefix`, its streams and its hidden size.

    kind: the checkpoint's dialect.

    Raises:
        ValueError: a tensor is missing, or has another shape, dtype or scale than the configuration needs, by name.
    """
    streams, width = _streams(kind, checkpoint, prefix)
    with torch.device("meta"):
        expected = EngramFusion(config, width, streams).state_dict()
    shapes = {name: tuple(value.shape) for name, value in fusion_to(kind, expected, streams).items()}
    weights = fusion_from(kind, lambda name: _dense(checkpoint, prefix + name, shapes[name]), config, streams)
    return {name: weights[name].float().contiguous() for name in expected}, streams, width


def _streams(kind: str, checkpoint: Checkpoint, prefix: str) -> tuple[int, int]:
    """Return the residual streams and the hidden size of a layer's fusion, by the shapes of its tensors."""
    first = checkpoint.one(prefix + ("q_weight" if kind == "deepseek-v4.1" else "value_proj.weight"))
    streams, width = (*first.shape, 0, 0)[:2]
    if kind == "demo":
        streams, width = sum(name.startswith(prefix + "norm1.") for name in checkpoint.tensors), streams
    elif kind == "qwen":
        gains = checkpoint.one(prefix + "norm_query.weight")
        streams, width = (*gains.shape, 0)[0] // max(streams, 1), streams
    if len(first.shape) != 2 or streams < 1 or width < 1:
        raise ValueError(
            f"{first.path}: tensor {first.name} is {list(first.shape)}: these are not the weights of a memory"
        )
    return streams, width


def _dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a small tensor as float32. Scales of e4m3 values are per block (32 x 32 in DeepSeek-V4.1)."""
    stored = checkpoint.one(name, shape)
    if stored.dtype not in ("F32", "BF16", "F16", "F8_E4M3"):
        raise ValueError(f"{stored.path}: tensor {name} is {stored.dtype}, expected F32, BF16, F16 or F8_E4M3")
    value = _read_same(checkpoint, name).float()
    scale_name = scale_of(checkpoint, name)
    if stored.dtype == "F8_E4M3":
        value = value * _scales(checkpoint, name, scale_name, shape)
    elif scale_name is not None:
        raise ValueError(f"tensor {scale_name} scales {name}, which is {stored.dtype}, not F8_E4M3")
    if not value.isfinite().all():
        raise ValueError(f"{stored.path}: tensor {name} holds a value that is not finite")
    return value


def _read_same(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a tensor of which every rank has a copy. Raise ValueError if the copies differ."""
    first, *others = checkpoint.tensors[name]
    content = first.read_bytes(first.offset, first.nbytes)
    for other in others:
        if other.dtype != first.dtype or not torch.equal(other.read_bytes(other.offset, other.nbytes), content):
            raise ValueError(
                f"tensor {name} is not the same in {first.path} and in {other.path}: they belong to different models"
            )
    return first.read()


def _scales(checkpoint: Checkpoint, name: str, scale_name: str | None, shape: tuple[int, ...]) -> Tensor:
    """Return the scale of each value of an e4m3 tensor, as float32 of its shape."""
    if scale_name is None:
        raise ValueError(f"tensor {name.removesuffix('weight')}scale is missing: {name} is e4m3 and needs scales")
    stored = checkpoint.one(scale_name)
    scale = _read_same(checkpoint, scale_name)
    if stored.dtype == "U8":  # files from before safetensors had a name for e8m0
        scale = scale.view(torch.float8_e8m0fnu)
    if stored.shape in ((), (1,), (shape[0],)) and len(shape) == 2:  # one scale, or one per row
        scale = scale.view(-1, 1)
    blocks = [b for b in ((32, 32), (128, 128), (1, 32), (1, shape[1]), shape) if scale.shape == _blocks(shape, b)]
    if not blocks or stored.dtype not in SCALES or scale.float().isnan().any():
        raise ValueError(
            f"{stored.path}: tensor {scale_name} is {stored.dtype} {list(stored.shape)} for {name} {list(shape)}: "
            f"expected a scale per 32 x 32, 128 x 128 or 1 x 32 values, per row or for all, none of them NaN"
        )
    wide = scale.float().repeat_interleave(blocks[0][0], 0).repeat_interleave(blocks[0][1], 1)
    return wide[: shape[0], : shape[1]]


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of blocks along each dimension."""
    return tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
