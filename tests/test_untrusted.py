"""Files and text of others: what is opened, parsed and printed, and what is refused by name."""

from __future__ import annotations

import json
import os
import socket

import pytest
import safetensors.torch
import torch

from engram import EngramConfig, EngramMemory, HostTable, TokenMap, convert
from engram.integrations.formats import inspect_file
from engram.integrations.formats.readers import read_config, read_token_map
from engram.storage.untrusted import open_regular, parse_json, printable, read_json, read_tensors, read_tokenizer
from engram.tables import EncodedTable

READERS = [
    lambda path: open_regular(path),
    lambda path: read_json(path, "a config"),
    lambda path: read_tensors(path, "weights"),
    lambda path: read_tokenizer(path),
]


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_a_regular_file_is_refused_by_name_and_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))  # such names are short
        for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "socket", "/dev/zero", tmp_path / "absent"):
            with pytest.raises(OSError, match=str(path)):
                reader(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "expected a JSON object"),
        ("7", "expected a JSON object"),
        ('{"a": Infinity}', "Infinity is not a finite number"),
        ('{"a": -1e999}', "-1e999 is not a finite number"),
        ('{"a": [NaN]}', "NaN is not a finite number"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        (b'{"a": "\xff"}', "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_not_a_plain_object_is_refused_by_name(content, reason, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"config.json is damaged, or is not a config: .*{reason}"):
        read_json(path, "a config")
    with pytest.raises(ValueError, match=reason):
        parse_json(path.read_bytes())


def test_json_longer_than_its_bound_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(ValueError, match=r"a.json is longer than 100 bytes: it is not a config"):
        read_json(tmp_path / "a.json", "a config", longest=100)
    assert read_json(tmp_path / "a.json", "a config", longest=200)["a"] == "b" * 100


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x00" * 40, b"\xff" * 400, b'{"version":"1.0"}', b'{"model":{"type":"BPE"}}']
)
def test_damaged_weights_and_tokenizers_are_value_errors_with_the_files_name(content, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some.json is damaged, or is not weights"):
        read_tensors(path, "weights")
    for read in (read_tokenizer, read_token_map):
        with pytest.raises(ValueError, match=r"some.json is damaged, or is not a tokenizer"):
            read(path)


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "\x9b2J",
        "a\rb",
        "a\x00b",
        "\x7f",
        "\u202egpj",
        "\u2066x\u2069",
        "\u200fx",
        "a\u2028b",
        "\ud800",
        "\U000e0041",
    ],
)
def test_nothing_that_commands_a_terminal_or_reorders_it_is_printable(text):
    shown = printable(f"before {text} after")
    assert shown.startswith("before ") and shown.endswith(" after") and "�" in shown
    assert not set(shown) & set("\x1b\x07\x9b\r\x00\x7f\u202e\u2066\u2069\u200f\u2028\ud800\U000e0041")
    shown.encode()


@pytest.mark.parametrize("text", ["line\n\ttab", "日本語", "می‌خواهم", "👩‍💻", "é e\u0301", "a\xa0b", "\ue000", "[/x]"])
def test_text_of_every_script_is_printed_as_it_is(text):
    assert printable(text) == text


def test_files_of_memories_that_are_pipes_are_refused_and_not_waited_for(tmp_path):
    memory = EngramMemory(
        EngramConfig(layers=(1,), rows_per_head=50), TokenMap.identity(8), 4, folder=tmp_path / "rows"
    )
    memory.save(tmp_path / "saved")
    for name in ("manifest.json", "config.json", "fusion.safetensors", "token_map.safetensors"):
        kept = (tmp_path / "saved" / name).read_bytes()
        (tmp_path / "saved" / name).unlink()
        os.mkfifo(tmp_path / "saved" / name)
        with pytest.raises((ValueError, OSError), match="manifest.json|" + name):
            EngramMemory.load(tmp_path / "saved")
        (tmp_path / "saved" / name).unlink()
        (tmp_path / "saved" / name).write_bytes(kept)
    assert EngramMemory.load(tmp_path / "saved").config == memory.config
    os.mkfifo(tmp_path / "x.json")
    for read in (read_config, lambda path: read_token_map(tmp_path / "x.json")):
        with pytest.raises(OSError, match=r"x\.json"):
            read(str(tmp_path / "x.json"))


@pytest.mark.parametrize("read", [inspect_file, lambda path: convert(path, f"{path}.new", "engram"), read_config])
@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.bin"])
def test_a_pipe_in_place_of_a_model_is_refused_by_name_though_others_lie_beside_it(read, name, tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"{name} is a pipe"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.safetensors", "model-00001-of-00002.safetensors", "model0-mp1.safetensors"])
def test_a_pipe_among_the_files_of_a_model_is_refused_by_name(name, tmp_path):
    os.mkfifo(tmp_path / name)
    if "-of-" in name:
        safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / name.replace("00001-", "00002-"))
    for read in (inspect_file, lambda path: convert(path, tmp_path / "new", "engram")):
        with pytest.raises(OSError, match=f"{name} is a pipe"):
            read(tmp_path)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_rows_behind_a_pipe_are_refused_by_name(mode, tmp_path):
    os.mkfifo(tmp_path / "x.rows")
    for table in (
        lambda: HostTable(10, 8, path=tmp_path / "x.rows", mode=mode),
        lambda: EncodedTable(10, 32, "fp8", path=tmp_path / "x.rows", mode=mode),
    ):
        with pytest.raises(OSError, match=r"x\.rows is a pipe"):
            table()
    EngramMemory(EngramConfig(layers=(1,), rows_per_head=50), TokenMap.identity(8), 4, folder=tmp_path / "f").close()
    (tmp_path / "f" / "layer-1.rows").unlink()
    os.mkfifo(tmp_path / "f" / "layer-1.rows")
    with pytest.raises(OSError, match=r"layer-1\.rows is a pipe"):
        EngramMemory(EngramConfig(layers=(1,), rows_per_head=50), TokenMap.identity(8), 4, folder=tmp_path / "f")


def test_weights_of_every_dtype_that_safetensors_names_are_read_or_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(3, dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors", "weights")["a"].shape == (3,)
    data = (tmp_path / "a.safetensors").read_bytes()
    for name in (b"F8_E3M2", b"F9_E4M3", b"F6_E2M3"):
        (tmp_path / "a.safetensors").write_bytes(data.replace(b"F8_E4M3", name))
        with pytest.raises(ValueError, match=r"a.safetensors is damaged, or is not weights"):
            read_tensors(tmp_path / "a.safetensors", "weights")
