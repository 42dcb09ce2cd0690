from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers_v3_v4 import token_map, tokenizer

from engram.addressing import HashLayout, NgramHasher, TokenMap

GOLDEN = Path(__file__).parent / "golden"


def small_tokenizer() -> Tokenizer:
    """Byte-level tokens, written in the printable alphabet of byte-level BPE."""
    spelled = [
        ("apple", 0),
        ("Apple", 0),  # case
        ("Ġapple", 0),  # a space at the edge
        ("ÃĢpple", 0),  # Àpple: accents
        ("Ġ", 1),  # a lone space stays a space
        ("ĊĊ", 1),  # and any run of white space is one
        ("Ã", 2),  # half a character: known by its raw token
        ("Â", 3),
        ("Ìģ", 4),  # a lone accent normalises to nothing: known by its text
        ("ï½ģ", 5),  # full-width a
        ("a", 5),
    ]
    result = Tokenizer(models.WordLevel({token: i for i, (token, _) in enumerate(spelled)}, unk_token="a"))
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken("<s>", special=True)])
    return result


SMALL_MAP = [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "map.safetensors"
    TokenMap(np.array([0, 1, 0, 2])).save(path)
    return path


def test_texts_equal_after_normalisation_share_a_compressed_id() -> None:
    assert TokenMap.from_tokenizer(small_tokenizer()).table.tolist() == SMALL_MAP


def test_fast_hugging_face_tokenizer_gives_the_map_of_the_tokenizer_it_wraps() -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer())
    assert TokenMap.from_tokenizer(fast).table.tolist() == SMALL_MAP


def test_slow_hugging_face_tokenizer_is_read_through_decode() -> None:
    class Slow:
        inner = small_tokenizer()

        def __len__(self) -> int:
            return self.inner.get_vocab_size()

        def convert_ids_to_tokens(self, i: int) -> str:
            return self.inner.id_to_token(i)

        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            assert not clean_up_tokenization_spaces
            return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    assert TokenMap.from_tokenizer(Slow()).table.tolist() == SMALL_MAP


def test_something_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot read the vocabulary of dict"):
        TokenMap.from_tokenizer({"a": 0})


@pytest.mark.parametrize("name, golden", [("v3", "demo"), ("v4", "deepseek_v41")])
def test_map_of_a_real_tokenizer_equals_the_published_one(name: str, golden: str) -> None:
    expected = json.loads((GOLDEN / f"{golden}.json").read_text())
    built = token_map(name)
    assert len(built.table) == expected["vocabulary"]
    assert built.size == expected["compressed_vocabulary"]
    assert built.digest == expected["token_map_sha256_int64_le"]


def test_real_text_gets_the_published_compressed_ids() -> None:
    expected = json.loads((GOLDEN / "demo.json").read_text())
    ids = tokenizer("v3").encode(expected["text"], add_special_tokens=False).ids
    assert ids == expected["raw_ids"]
    assert token_map("v3")(np.array(ids)).tolist() == expected["compressed_ids"]


def test_token_map_of_another_tokenizer_version_is_refused_by_the_layout() -> None:
    layout = HashLayout.build(token_map("v3").size, [1], [2, 3], 8, 1000, pad_id=2)
    with pytest.raises(ValueError, match=r"token map has 99092 compressed ids .* built for 98627"):
        NgramHasher(layout, token_map("v4"))


def test_token_map_of_another_size_is_refused_by_the_layout() -> None:
    layout = HashLayout.build(100, [1], [2, 3], 8, 1000, pad_id=2)
    with pytest.raises(ValueError, match="belongs to another tokenizer or version"):
        NgramHasher(layout, TokenMap.identity(101))


def test_identity_maps_every_id_to_itself() -> None:
    identity = TokenMap.identity(5)
    assert identity.size == 5
    assert identity(np.array([[4, 0]])).tolist() == [[4, 0]]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_numpy_and_torch_ids_give_the_same_compressed_ids(dtype: type) -> None:
    ids = np.array([[0, 3], [2, 1]], dtype=dtype)
    token_map = TokenMap(np.array([0, 1, 0, 2]))
    from_numpy, from_torch = token_map(ids), token_map(torch.from_numpy(ids))
    assert from_numpy.dtype == np.int64 and from_torch.dtype == torch.int64
    assert from_numpy.tolist() == from_torch.tolist() == [[0, 2], [0, 1]]


def test_negative_ids_pass_through() -> None:
    token_map = TokenMap(np.array([1, 0]))
    assert token_map(np.array([-1, 0, -7])).tolist() == [-1, 1, -7]
    assert token_map(torch.tensor([-1, 0, -7])).tolist() == [-1, 1, -7]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_id_outside_the_vocabulary_raises_instead_of_being_clamped(kind) -> None:
    with pytest.raises(IndexError, match=r"token id 4 at \[1, 0\] is outside .* vocabulary of 4"):
        TokenMap.identity(4)(kind([[0, 3], [4, 1]]))


@pytest.mark.parametrize("ids", [np.array([0.0]), np.array([True]), torch.tensor([0.0]), torch.tensor([True]), [0]])
def test_ids_that_are_no_integers_are_refused(ids) -> None:
    with pytest.raises(TypeError, match="token ids must be"):
        TokenMap.identity(4)(ids)


def test_empty_ids_give_empty_compressed_ids() -> None:
    assert TokenMap.identity(4)(np.zeros((2, 0), np.int64)).shape == (2, 0)
    assert TokenMap.identity(4)(torch.zeros((2, 0), dtype=torch.int64)).shape == (2, 0)


@pytest.mark.parametrize("table", [[0, 2], [-1, 0], [], [[0, 1]]])
def test_table_that_does_not_use_every_compressed_id_is_refused(table) -> None:
    with pytest.raises(ValueError, match="token map"):
        TokenMap(np.array(table, dtype=np.int64))


def test_table_cannot_be_changed_under_its_digest() -> None:
    given = np.array([0, 1, 0])
    token_map = TokenMap(given)
    given[0] = 1
    assert token_map.table.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="read-only"):
        token_map.table[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        copy.deepcopy(token_map).table[0] = 1


def test_saved_map_loads_with_the_same_table_and_digest(file: Path) -> None:
    loaded = TokenMap.load(file)
    assert loaded.table.tolist() == [0, 1, 0, 2]
    assert loaded.digest == TokenMap(np.array([0, 1, 0, 2])).digest
    assert os.listdir(file.parent) == [file.name]


def test_missing_map_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no token map at .*absent"):
        TokenMap.load(tmp_path / "absent")


def test_torn_map_file_is_refused_at_every_length(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"map\.safetensors"):
            TokenMap.load(file)


def test_map_file_with_an_altered_entry_is_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-24] = 2  # the second of four int64 entries: 0 1 0 2 -> 0 2 0 2
    file.write_bytes(data)
    with pytest.raises(ValueError, match="was altered"):
        TokenMap.load(file)


def test_map_file_with_an_altered_size_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"size":"3"', b'"size":"4"'))
    with pytest.raises(ValueError, match="was altered: its table has 3"):
        TokenMap.load(file)


def test_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"table": np.arange(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no token map"):
        TokenMap.load(tmp_path / "other")


def test_failed_save_leaves_the_old_file_and_no_rest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        TokenMap.identity(9).save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
