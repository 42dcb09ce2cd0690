"""Move the n-gram tables of a Qwen4-Exp model of transformers out of the model, to disk or host memory.

The model keeps its own hashing, gate and convolution; a table replaces its nn.Embedding. The rows are the same bits, so
the logits are the same too. This is for inference: the rows get no gradient.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram.integrations.formats.readers import Source, open_source
from engram.integrations.formats.recoder import BLOCK, Recoder
from engram.integrations.formats.safetensors_io import NAMES, Stored
from engram.integrations.formats.stored_rows import Rows
from engram.storage.files import write_rows
from engram.storage.folders import read_folder, whole_folder
from engram.storage.manifest import load_manifest, manifest_digest
from engram.tables import EncodedTable, HostTable, Table

FORMAT = "engram-offload-1"
_SAMPLE = 256  # rows compared with their source


class HostedRows(nn.Module):
    """Replacement of nn.Embedding: row ids [...] -> rows [..., dim], in the model's dtype, on the device of the ids.

    `weight` has no values; its dtype and device follow the model's, as callers expect of an embedding.
    """

    weight: Tensor

    def __init__(self, dtype: torch.dtype, table: Table | None = None):
        super().__init__()
        self.table = table
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, row_ids: Tensor) -> Tensor:
        if self.table is None:
            raise RuntimeError("the rows of this module were not loaded: open the checkpoint with load_offloaded")
        return self.table.gather(row_ids.cpu()).to(row_ids.device, self.weight.dtype)


def _embeddings(model: nn.Module) -> dict[int, Any]:
    """Return {0-based layer: the module that hashes ids and looks up rows} of a Qwen4-Exp model."""
    modules: list[Any] = [m for m in model.modules() if type(m).__name__ == "Qwen4ExpTextNGramEmbedding"]
    return {int(m.layer_idx): m for m in modules}


def offload(hf_model: nn.Module, folder: str | os.PathLike[str] | None = None) -> dict[int, Table]:
    """Move the n-gram tables of a loaded Qwen4-Exp model into HostTables. The model's logits stay the same.

    Args:
        hf_model: Qwen4ExpForCausalLM or any model that contains one. folder: a new folder for the rows, which are then
            mapped read-only (`engram verify` checks them); None keeps them in host memory.

    Returns:
        {0-based layer: HostTable}. The model takes less memory by the tables' size (with folder=None, less of its
        device's memory only). save_pretrained no longer writes the rows.

    Raises:
        ValueError: a model without such a table, one that was offloaded already, or rows that are neither float32 nor
        bfloat16. FileExistsError: the folder exists.
    """
    embeddings = _embeddings(hf_model)
    if not embeddings:
        raise ValueError(
            f"{type(hf_model).__name__} has no n-gram table that offload can move: it supports Qwen4-Exp's PLE layers"
        )
    weights: dict[int, Tensor] = {}
    for layer, module in embeddings.items():
        weight = module.ngram_embedding.weight
        if isinstance(module.ngram_embedding, HostedRows):
            raise ValueError(f"the table of layer {layer} is offloaded already")
        if weight.device.type == "meta":
            raise ValueError(f"the table of layer {layer} is not loaded: use load_offloaded on the checkpoint instead")
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the table of layer {layer} is {weight.dtype}: expected torch.float32 or torch.bfloat16")
        weights[layer] = weight.detach()

    def blocks(layer: int) -> Iterator[Tensor]:
        weight = weights[layer]
        yield from (piece.cpu() for piece in weight.split(max(1, BLOCK // (4 * weight.shape[1]))))

    shapes = {n: (*w.shape, str(w.dtype).removeprefix("torch.")) for n, w in weights.items()}
    tables = _store(shapes, blocks, folder)
    for layer, module in embeddings.items():
        ids = torch.randint(0, tables[layer].rows, (_SAMPLE,), generator=torch.Generator().manual_seed(0), device="cpu")
        if not torch.equal(tables[layer].gather(ids), weights[layer][ids.to(weights[layer].device)].cpu()):
            raise OSError(f"the rows of layer {layer} do not read back as they were written: check the disk")
        module.ngram_embedding = HostedRows(weights[layer].dtype, tables[layer])
    return tables


def _store(
    shapes: Any, blocks: Any, folder: str | os.PathLike[str] | None, origin: dict[str, Any] | None = None
) -> dict[int, Table]:
    """Return tables filled with blocks(layer). shapes: {layer: (rows, dim, name of the dtype or codec)}; origin: of the
    rows, for the manifest."""
    if folder is None:
        tables: dict[int, Table] = {}
        for layer, (rows, dim, stored_as) in shapes.items():
            table: Table = (
                EncodedTable(rows, dim, "fp8")
                if stored_as == "fp8"
                else HostTable(rows, dim, getattr(torch, stored_as))
            )
            first = 0
            for block in blocks(layer):
                table.tensor[first : first + len(block)] = block
                first += len(block)
            tables[layer] = table
        return tables
    home = Path(folder)
    with whole_folder(home, overwrite=False) as partial:
        manifest: dict[str, Any] = {"format": FORMAT, "origin": origin, "tables": {}, "files": {}}
        for layer, (rows, dim, stored_as) in shapes.items():
            name = f"layer-{layer}.{stored_as}"
            manifest["files"][name] = write_rows(partial / name, blocks(layer))
            manifest["tables"][str(layer)] = {"file": name, "rows": rows, "dim": dim, "form": stored_as}
        manifest["digest"] = manifest_digest(manifest)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return _open(home)


def _open(folder: Path) -> dict[int, Table]:
    return read_folder(folder, lambda pinned: _tables_of(folder, pinned))


def _tables_of(shown: Path, home: Path) -> dict[int, Table]:
    """Open the tables of the folder `shown`. home: the path at which its files are read (see pinned_folder)."""
    tables: dict[int, Table] = {}
    manifest = load_manifest(home)
    if manifest.get("format") != FORMAT or manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{home / 'manifest.json'} is not an {FORMAT} manifest, or was altered: pass another folder")
    for layer, table in manifest["tables"].items():
        path, shape = home / table["file"], (table["rows"], table["dim"])
        if table["file"] not in manifest["files"]:  # load_manifest has checked the names in this list
            raise ValueError(
                f"{home / 'manifest.json'} names {table['file']!r} for layer {layer}, which is not in its list of "
                f"files: pass another folder"
            )
        if table["form"] == "fp8":
            tables[int(layer)] = EncodedTable(*shape, "fp8", path, mode="r")
        else:
            tables[int(layer)] = HostTable(*shape, getattr(torch, table["form"]), path, mode="r")
        tables[int(layer)].path = shown / table["file"]
    return tables


def load_offloaded(
    checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, **kwargs: Any
) -> Any:
    """Load a Qwen4-Exp model from a safetensors checkpoint, with its n-gram tables outside the model.

    The rows are copied block by block from the checkpoint's shards into `folder`, and from_pretrained loads everything
    else. If an earlier call has written `folder` from the same checkpoint, it is opened again: a sample of its rows is
    compared with the checkpoint, or all rows if a file of the checkpoint has another size or modification time.

    Args:
        checkpoint: folder with config.json and safetensors. folder: for the rows; None keeps them in host memory.
        kwargs: for from_pretrained (dtype, attn_implementation, device_map ...).

    Returns:
        The model, in eval mode. The table of a layer is module.ngram_embedding.table.

    Raises:
        ValueError: a checkpoint that open_source refuses or that lacks weights; a folder with other rows than the
        checkpoint's. FileExistsError: a folder without rows.
    """
    import transformers

    source = open_source(checkpoint)
    if source.kind != "qwen":
        raise ValueError(f"{checkpoint} is a {source.kind} memory: load_offloaded reads Qwen4-Exp checkpoints")
    recoders = {layer: Recoder(rows, rows.kept) for layer, rows in source.rows.items()}

    def blocks(layer: int) -> Iterator[Tensor]:
        rows, block = recoders[layer].rows.rows, recoders[layer].block
        yield from (recoders[layer].read(lo, min(lo + block, rows)) for lo in range(0, rows, block))

    if folder is not None and (Path(folder) / "manifest.json").is_file():
        tables = _open(Path(folder))
        changed = json.loads((Path(folder) / "manifest.json").read_text()).get("origin") != _origin(source)
        _check_same(source.rows, recoders, tables, Path(folder), compare_all=changed)
    else:
        shapes = {layer: (rows.rows, rows.dim, rows.kept) for layer, rows in source.rows.items()}
        tables = _store(shapes, blocks, folder, _origin(source))

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    base = getattr(transformers, (config.architectures or ["Qwen4ExpForCausalLM"])[0])

    class Hosted(base):  # type: ignore[misc, valid-type]
        """The model's class without the tables, so that from_pretrained does not read their tensors."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            for module in _embeddings(self).values():
                module.ngram_embedding = HostedRows(torch.get_default_dtype())

    Hosted.__name__ = base.__name__
    Hosted._keys_to_ignore_on_load_unexpected = [
        *(base._keys_to_ignore_on_load_unexpected or []),
        r"ngram_embedding\.",  # shards and their scales, whatever they are called
    ]
    kwargs.pop("output_loading_info", None)
    model, loaded = Hosted.from_pretrained(checkpoint, config=config, output_loading_info=True, **kwargs)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{checkpoint} lacks {missing[0]}"
            + (f" and {len(missing) - 1:,} more of the model's weights" if len(missing) > 1 else "")
            + ", which would be random: its tensors are not named as transformers names them, or are incomplete"
        )
    model.__class__ = base
    for layer, module in _embeddings(model).items():
        module.ngram_embedding.table = tables[layer]
    return model.eval()


def _origin(source: Source) -> dict[str, Any]:
    """Return sizes and modification times of the files that hold the rows; the files themselves are not read."""
    files = {stored.path for rows in source.rows.values() for _, *parts in rows.parts for stored in parts if stored}
    stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    return {"layout": source.layout.digest, "files": stamps}


def _check_same(
    rows: dict[int, Rows], recoders: dict[int, Recoder], tables: dict[int, Table], home: Path, compare_all: bool
) -> None:
    """Compare all rows, or a sample of them, with the checkpoint's. Raise ValueError at the first that differs."""
    generator = torch.Generator().manual_seed(0)
    if set(rows) != set(tables):
        raise ValueError(f"{home} holds tables of layers {sorted(tables)}, the checkpoint has {sorted(rows)}")
    for layer, table in tables.items():
        if (table.rows, table.dim) != (rows[layer].rows, rows[layer].dim):
            raise ValueError(
                f"{home} holds {table.rows:,} x {table.dim} values of layer {layer}, the checkpoint "
                f"{rows[layer].rows:,} x {rows[layer].dim}: pass another folder, or delete this one"
            )
        assert table.path is not None
        shape, dtype = tuple(table.tensor.shape), NAMES[table.tensor.dtype]
        # Read, not mapped, so that the rows do not stay in memory.
        file = Stored(table.path.name, table.path, dtype, shape, 0, table.nbytes)
        sample = torch.randint(0, table.rows, (_SAMPLE,), generator=generator, device="cpu").tolist()
        size = recoders[layer].block if compare_all else 1
        for row in range(0, table.rows, size) if compare_all else sample:
            stop = min(row + size, table.rows)
            expected, stored = recoders[layer].read(row, stop), file.read(row, stop)
            if not torch.equal(expected, stored):
                row += int((expected != stored).any(1).nonzero()[0])
                raise ValueError(
                    f"row {row:,} of layer {layer} in {home} is not the checkpoint's: pass another folder, or delete it"
                )
