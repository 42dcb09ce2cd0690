from __future__ import annotations

import copy
import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers_v3_v4 import token_map, tokenizer

from engram.addressing import HashLayout, NgramHasher, TokenMap

GOLDEN = Path(__file__).parent / "golden"


def small_tokenizer() -> Tokenizer:
    """Make a tokenizer of byte-level tokens, written in the printable alphabet of byte-level BPE."""
    spelled = [
        ("apple", 0),
        ("Apple", 0),  # case
        ("Ġapple", 0),  # a space at the edge
        ("ÃĢpple", 0),  # Àpple: accents
        ("Ġ", 1),  # a lone space stays a space
        ("ĊĊ", 1),  # and any run of white space is one
        ("Ã", 2),  # half a character: identified by its raw token
        ("Â", 3),
        ("Ìģ", 4),  # a lone accent normalises to nothing: identified by its text
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


@pytest.mark.parametrize("given", [{"a": 0}, "tokenizer.json", Path("tokenizer.json"), None, len])
def test_an_object_that_is_not_a_tokenizer_is_refused(given) -> None:
    with pytest.raises(TypeError, match=f"cannot read the vocabulary of {type(given).__name__}"):
        TokenMap.from_tokenizer(given)


# One vocabulary, many classes. A byte-level one: the 256 bytes, some merges, a special token.

MERGES = [b"ap", b"Ap", b" a", b"\xe6\x97", "\u65e5".encode(), b"\r\n", b"\xc3\xa9", b" \xe6"]
BYTES = [bytes([b]) for b in range(256)] + MERGES


def letters(data: bytes) -> str:
    return "".join(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(data.decode())[0][0])


def byte_level() -> Tokenizer:
    alphabet = {letters(chr(b).encode()): b for b in range(128)}  # complete characters; others by the rule of GPT-2
    others = iter(c for c in map(chr, range(256 + 34, 512)) if c not in alphabet)
    for b in range(128, 256):
        printable = 161 <= b < 173 or 174 <= b
        alphabet[chr(b) if printable else next(others)] = b
    spelled = {b: c for c, b in alphabet.items()}
    tokens = ["".join(spelled[b] for b in data) for data in BYTES]
    result = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken("<end>", special=True)])
    return result


class Slow:
    """A tokenizer of the kind that models define in their own code."""

    def __init__(self, errors: str, bytes_as_tokens: bool):
        self.errors, self.bytes_as_tokens, self.fast = errors, bytes_as_tokens, byte_level()

    def __len__(self) -> int:
        return len(BYTES) + 1

    def convert_ids_to_tokens(self, i: int) -> str | bytes:
        return BYTES[i] if self.bytes_as_tokens and i < len(BYTES) else self.fast.id_to_token(i)

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "<end>" if ids[0] == len(BYTES) else BYTES[ids[0]].decode(errors=self.errors)


class LikeTiktoken:
    n_vocab = len(BYTES) + 1

    def decode_single_token_bytes(self, i: int) -> bytes:
        return b"<end>" if self.is_special_token(i) else BYTES[i]

    def is_special_token(self, i: int) -> bool:
        return i == len(BYTES)


class LikeTekken:
    n_words = len(BYTES) + 1

    def is_special(self, i: int) -> bool:
        return i == len(BYTES)

    def id_to_byte_piece(self, i: int) -> bytes:
        return b"" if self.is_special(i) else BYTES[i]

    def id_to_piece(self, i: int) -> str:  # loses incomplete characters
        return "<end>" if self.is_special(i) else BYTES[i].decode(errors="replace")


@pytest.mark.parametrize(
    "make",
    [
        lambda: pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=byte_level()),
        lambda: SimpleNamespace(tokenizer=byte_level()),  # a processor
        lambda: Slow("replace", False),
        lambda: Slow("ignore", False),
        lambda: Slow("replace", True),
        LikeTiktoken,
        LikeTekken,
        lambda: SimpleNamespace(instruct_tokenizer=SimpleNamespace(tokenizer=LikeTekken())),
    ],
    ids=["fast", "processor", "replace", "ignore", "bytes", "tiktoken", "tekken", "mistral-common"],
)
def test_a_byte_level_vocabulary_has_one_map_whatever_loads_it(make) -> None:
    expected = TokenMap.from_tokenizer(byte_level())
    assert TokenMap.from_tokenizer(make()).digest == expected.digest
    classes = expected.table.tolist()
    assert len(set(classes[128:256])) == 128  # parts of characters
    assert classes[ord("A")] == classes[ord("a")] == classes[len(BYTES) - 6] and classes[256] == classes[257]
    assert len({*classes[259:]}) == 6 and classes[ord("\n")] == classes[261]


# A vocabulary with byte fallback, as SentencePiece writes it.

PIECES = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "\u2581\u2581", "\u2581\u2581\u2581", "\u2581the"]
PIECES += ["The", "\u65e5", "a", "\u2581A", "\u00c4"]


def byte_fallback() -> Tokenizer:
    result = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    result.decoder = decoders.Sequence(steps)
    return result


class LikeSentencePiece:
    def get_piece_size(self) -> int:
        return len(PIECES)

    def id_to_piece(self, i: int) -> str:
        return PIECES[i]

    def encode(self, text: str) -> list[int]:
        return [PIECES.index("\u2581"), PIECES.index(text)]


class LikeMistralsSentencePiece(LikeSentencePiece):
    n_words = len(PIECES)

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        assert not bos and not eos
        return super().encode(text)


class SlowSentencePiece:
    sp_model = LikeSentencePiece()

    def __len__(self) -> int:
        return len(PIECES)

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(PIECES)}

    def convert_ids_to_tokens(self, i: int) -> str:
        return PIECES[i]

    def decode(self, ids: list[int], **options) -> str:  # as in transformers: without bytes, and without all spaces
        return PIECES[ids[0]].replace("\u2581", " ").strip()


@pytest.mark.parametrize("make", [LikeSentencePiece, LikeMistralsSentencePiece, SlowSentencePiece])
def test_a_vocabulary_with_byte_fallback_has_one_map_whatever_loads_it(make) -> None:
    expected = TokenMap.from_tokenizer(byte_fallback())
    assert TokenMap.from_tokenizer(make()).digest == expected.digest
    classes = dict(zip(PIECES, expected.table.tolist(), strict=True))
    assert classes["\u2581"] == classes["<0x20>"]  # both are one space, which the decoder strips
    assert classes["\u2581\u2581"] == classes["\u2581\u2581\u2581"] == classes["<0x0A>"] == classes["<0x09>"]
    assert classes["<0x41>"] == classes["a"] == classes["\u2581A"] == classes["\u00c4"]
    assert classes["\u2581the"] == classes["The"]
    assert len({classes[f"<0x{b:02X}>"] for b in range(128, 256)}) == 128


@pytest.mark.parametrize(
    "texts",
    [
        ("\u65e5\u672c\u8a9e", "\u4e2d\u56fd\u4eba"),
        ("\u00e9", "\u00e8"),
        ("\U0001f600", "\U0001f680"),
        ("\u05d0", "\u05d1"),
    ],
)
@pytest.mark.parametrize("name", ["ByT5Tokenizer", "PerceiverTokenizer"])
def test_texts_of_byte_tokenizers_read_rows_of_their_own(name: str, texts) -> None:
    bytewise = getattr(pytest.importorskip("transformers"), name)()
    token_map = TokenMap.from_tokenizer(bytewise)
    one, other = (token_map(np.array(bytewise.encode(text, add_special_tokens=False))).tolist() for text in texts)
    assert one != other
    layout = HashLayout.build(token_map.size, [0], [2], 2, 997, pad_id=0)
    rows = [NgramHasher(layout, token_map)(np.array([bytewise.encode(t, add_special_tokens=False)]))[0] for t in texts]
    assert rows[0][0].tolist() != rows[1][0].tolist()


def test_an_id_without_a_token_has_a_class_of_its_own() -> None:
    gaps = Tokenizer(models.WordLevel({"a": 0, "b": 2, "A": 7, "c": 9}, unk_token="a"))
    assert TokenMap.from_tokenizer(gaps).table.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 7, 8]
    fast = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=gaps)
    assert len(fast) == 4 and TokenMap.from_tokenizer(fast).digest == TokenMap.from_tokenizer(gaps).digest

    class Gap(LikeTiktoken):
        n_vocab = len(BYTES) + 4

        def decode_single_token_bytes(self, i: int) -> bytes:
            if len(BYTES) <= i < len(BYTES) + 3:
                raise KeyError(i)
            return super().decode_single_token_bytes(i)

        def is_special_token(self, i: int) -> bool:
            return i == len(BYTES) + 3

    classes = TokenMap.from_tokenizer(Gap()).table
    assert len(classes) == len(BYTES) + 4 and len(set(classes[-4:].tolist())) == 4


def test_gaps_of_a_slow_tokenizer_are_not_its_unknown_token() -> None:
    class Holes(SlowSentencePiece):
        sp_model = None
        unk_token = "<unk>"
        names = {0: "<unk>", 1: "a", 4: "b", 6: "A"}  # noqa: RUF012

        def __len__(self) -> int:
            return len(self.names)

        def get_vocab(self) -> dict[str, int]:
            return {name: i for i, name in self.names.items()}

        def convert_ids_to_tokens(self, i: int) -> str:
            if i == 3:
                raise KeyError(i)
            return self.names.get(i, "<unk>")

        def decode(self, ids: list[int], **options) -> str:
            return self.convert_ids_to_tokens(ids[0])

    assert TokenMap.from_tokenizer(Holes()).table.tolist() == [0, 1, 2, 3, 4, 5, 1]


def test_halves_of_surrogate_pairs_are_kept_apart() -> None:
    class Characters(SlowSentencePiece):
        sp_model = None
        codes = [*range(0xD7FE, 0xD804), 0xDFFF, 0xE000, 65, 97]  # noqa: RUF012

        def __len__(self) -> int:
            return len(self.codes)

        def get_vocab(self) -> dict[str, int]:
            return {chr(code): i for i, code in enumerate(self.codes)}

        def convert_ids_to_tokens(self, i: int) -> str:
            return chr(self.codes[i])

        def decode(self, ids: list[int], **options) -> str:
            return chr(self.codes[ids[0]])

    assert TokenMap.from_tokenizer(Characters()).table.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize("text", ["?", "<unk>", "x"])
def test_a_decode_that_gives_many_tokens_one_text_is_refused(text: str) -> None:
    class Lossy(Slow):
        def decode(self, ids: list[int], **options) -> str:
            return text if 128 <= ids[0] < 256 else super().decode(ids, False, False)

    with pytest.raises(ValueError, match=rf"Lossy decodes 12[89] of its 265 tokens to '{re.escape(text)}'"):
        TokenMap.from_tokenizer(Lossy("replace", False))


def test_a_decode_that_fails_at_a_token_is_named() -> None:
    class Old(Slow):
        def decode(self, ids: list[int]) -> str:  # takes no options
            return ""

    class Torn(Slow):
        def decode(self, ids: list[int], **options) -> str:
            if ids[0] == 70:
                raise KeyError("no such row")
            return Slow.decode(self, ids, False, False)

    with pytest.raises(ValueError, match=r"Torn cannot decode its token 70 \(KeyError"):
        TokenMap.from_tokenizer(Torn("replace", False))
    with pytest.raises(ValueError, match=r"Old cannot decode its token 0 \(TypeError"):
        TokenMap.from_tokenizer(Old("replace", False))


@pytest.mark.parametrize("highest", [2**21, 2**31 - 1, 2**32 - 1])
def test_absurd_ids_are_refused_before_anything_is_made_of_them(highest: int) -> None:
    with pytest.raises(ValueError, match=f"highest id is {highest:,}"):
        TokenMap.from_tokenizer(Tokenizer(models.WordLevel({"a": 0, "b": highest}, unk_token="a")))


@pytest.mark.parametrize(
    "make", [lambda: Tokenizer(models.BPE()), lambda: SimpleNamespace(tokenizer=Tokenizer(models.BPE()))]
)
def test_an_empty_vocabulary_is_refused(make) -> None:
    with pytest.raises(ValueError, match="empty vocabulary"):
        TokenMap.from_tokenizer(make())


def test_tiktoken_itself_gives_the_map_of_the_tokenizer_it_loaded() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {data: i for i, data in enumerate(BYTES)}
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={"<end>": len(BYTES)})
    assert TokenMap.from_tokenizer(encoding).digest == TokenMap.from_tokenizer(byte_level()).digest


# A vocabulary that has grown.


def grown(added: list[str]) -> Tokenizer:
    result = small_tokenizer()
    result.add_tokens(added)
    return result


def test_new_ids_join_their_class_or_are_dead_and_the_old_ones_stay() -> None:
    old = TokenMap.from_tokenizer(small_tokenizer())
    new = old.extend(grown(["<im_start>", "APPLE", "<pad>", "  "]))
    assert new.table.tolist() == [*SMALL_MAP, -1, 0, -1, 1] and new.size == old.size
    assert new.is_extended_from(old.digest) and not old.is_extended_from(new.digest)
    assert new.digest != old.digest
    again = new.extend(grown(["<im_start>", "APPLE", "<pad>", "  ", "more", "A"]))
    assert again.table.tolist() == [*new.table.tolist(), -1, 5]
    assert all(again.is_extended_from(m.digest) for m in (old, new, again))
    assert again.extend(again) is again and old.extend(small_tokenizer()) is old
    assert new.extend(TokenMap.from_tokenizer(grown(["<im_start>", "APPLE", "<pad>", "  "]))) is new


@pytest.mark.parametrize(
    "table, said",
    [
        ([0, 1, 2, 2, 3], "differ in 2 of the 5 ids, first in id 1"),
        ([0, 1, 2, 0, 3, 4], "differ in 3 of the 5 ids, first in id 1"),
        ([0, 0, 1], "differ in 2 of the 5 ids, first in id 3, which the other one lacks"),
        ([0, 0, 1, 1, 2], "differ in 2 of the 5 ids, first in id 3"),
    ],
)
def test_a_map_with_a_removed_or_changed_token_is_refused(table, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenMap(np.array([0, 0, 1, 2, 3])).extend(TokenMap(np.array(table)))


def test_an_extended_map_is_saved_and_loaded(tmp_path: Path) -> None:
    new = TokenMap.identity(3).extend(TokenMap(np.array([0, 1, 2, 3, 1, 4])))
    assert new.table.tolist() == [0, 1, 2, -1, 1, -1]
    new.save(tmp_path / "map")
    loaded = TokenMap.load(tmp_path / "map")
    assert loaded.digest == new.digest and loaded.size == 3 and copy.deepcopy(loaded).digest == new.digest
    for ids in (np.array([[2, 3, 4, -1]]), torch.tensor([[2, 3, 4, -1]])):
        assert loaded(ids).tolist() == [[2, -1, 1, -1]]


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
def test_ids_that_are_not_integers_are_refused(ids) -> None:
    with pytest.raises(TypeError, match="token ids must be"):
        TokenMap.identity(4)(ids)


def test_empty_ids_give_empty_compressed_ids() -> None:
    assert TokenMap.identity(4)(np.zeros((2, 0), np.int64)).shape == (2, 0)
    assert TokenMap.identity(4)(torch.zeros((2, 0), dtype=torch.int64)).shape == (2, 0)


@pytest.mark.parametrize("table", [[0, 2], [-1, 0], [], [[0, 1]], [0, -1, 1], [0, -2], [-1]])
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
    with pytest.raises(ValueError, match="is a safetensors file but not a token map"):
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
