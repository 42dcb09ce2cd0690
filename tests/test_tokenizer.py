from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.lm import tokenizer as module
from engram.lm.corpus import Document
from engram.lm.tokenizer import encode, train_tokenizer

rng = random.Random(0)
STEMS = ["".join(rng.choice("abcdefgh") for _ in range(rng.randrange(2, 8))) for _ in range(300)]
TEXTS = [" ".join(rng.choice(STEMS) for _ in range(400)) + ".\n" for _ in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("cache"))


def document(text: str) -> Document:
    return Document("test", "d", text)


@settings(deadline=None)
@given(st.text())
def test_any_unicode_text_survives_encoding_and_decoding(tokenizer, text):
    ids = encode(tokenizer, [document(text)]).ids
    assert tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) == text


def test_text_that_contains_the_special_tokens_name_is_encoded_as_plain_text(tokenizer):
    encoded = encode(tokenizer, [document("a<|endoftext|>b")])
    assert (encoded.ids == 0).sum() == 1 and encoded.ids[0] == 0
    assert tokenizer.decode(encoded.ids[1:].tolist(), skip_special_tokens=False) == "a<|endoftext|>b"


def test_the_vocabulary_has_the_requested_size_and_endoftext_at_0(tokenizer):
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_a_vocabulary_of_257_is_a_plain_byte_tokenizer(tmp_path):
    plain = train_tokenizer(TEXTS, 257, tmp_path)
    encoded = encode(plain, [document("héllo, 世界"), document(TEXTS[0])])
    assert np.array_equal(np.diff(encoded.starts), encoded.bytes + 1)


def test_a_vocabulary_that_is_too_small_for_all_bytes_raises(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 256 is too small"):
        train_tokenizer(TEXTS, 256, tmp_path)


def test_the_warning_for_a_vocabulary_larger_than_the_text_supports_names_the_smaller_size(tmp_path):
    for _ in range(2):  # trained, then cached
        with pytest.warns(UserWarning, match=r"supports a vocabulary of (\d+) entries, not 5000"):
            small = train_tokenizer(["abc abc abd"], 5000, tmp_path)
        assert 257 < small.get_vocab_size() < 300


def test_training_again_in_another_process_gives_the_same_tokenizer(tokenizer, tmp_path):
    code = (
        "import sys; from tests.test_tokenizer import TEXTS, train_tokenizer;"
        "sys.stdout.write(train_tokenizer(TEXTS, 400, sys.argv[1]).to_str())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=True)
    assert result.stdout == tokenizer.to_str()


def test_a_cached_tokenizer_is_not_trained_again(tokenizer, tmp_path, monkeypatch):
    train_tokenizer(TEXTS, 400, tmp_path)
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    again = train_tokenizer(TEXTS, 400, tmp_path)
    assert again.to_str() == tokenizer.to_str()
    assert encode(again, [document("<|endoftext|>")]).ids.tolist().count(0) == 1


def test_each_text_and_size_has_its_own_cache_entry(tmp_path):
    for texts, size in ((TEXTS, 300), (TEXTS, 301), (TEXTS[1:], 300), ([TEXTS[0] + TEXTS[1], *TEXTS[2:]], 300)):
        train_tokenizer(texts, size, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b'"vocab":{', b'"vocab":{ '),
        lambda data: b"\xff" + data,
    ],
    ids=["truncated", "empty", "altered", "not-utf8"],
)
def test_a_tokenizer_with_a_damaged_cache_file_is_trained_again_and_the_file_replaced(tokenizer, tmp_path, damage):
    train_tokenizer(TEXTS, 400, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    broken = damage(whole)
    assert broken != whole
    file.write_bytes(broken)
    assert train_tokenizer(TEXTS, 400, tmp_path).to_str() == tokenizer.to_str()
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_gives_a_warning_and_leaves_no_incomplete_file(tokenizer, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="not cached in .*No space left on device"):
        assert train_tokenizer(TEXTS, 400, tmp_path).to_str() == tokenizer.to_str()
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "deep" / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_tokenizer(TEXTS, 300)
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 1


def test_documents_are_packed_in_order_and_each_begins_with_endoftext(tokenizer):
    texts = [TEXTS[0], "é", "", *TEXTS[1:]]
    packed = encode(tokenizer, [document(text) for text in texts])
    assert packed.ids.dtype == np.int32 and packed.documents.dtype == np.int32
    assert packed.starts.dtype == np.int64 and packed.bytes.dtype == np.int64
    assert packed.bytes.tolist() == [len(text.encode()) for text in texts]
    assert packed.starts[-1] == len(packed.ids) == len(packed.documents)
    for number, text in enumerate(texts):
        piece = slice(packed.starts[number], packed.starts[number + 1])
        assert packed.ids[piece][0] == 0 and (packed.documents[piece] == number).all()
        assert tokenizer.decode(packed.ids[piece][1:].tolist(), skip_special_tokens=False) == text


def test_a_document_has_the_same_ids_alone_and_among_many(tokenizer):
    crowd = [document(TEXTS[i % 20][i % 7 : 200]) for i in range(1100)]  # more than one internal batch
    packed = encode(tokenizer, crowd)
    for number in (0, 511, 512, 1024, 1099):
        alone = encode(tokenizer, [crowd[number]])
        assert np.array_equal(alone.ids, packed.ids[packed.starts[number] : packed.starts[number + 1]])


def test_encoding_an_empty_list_of_documents_raises(tokenizer):
    with pytest.raises(ValueError, match="no documents"):
        encode(tokenizer, [])
