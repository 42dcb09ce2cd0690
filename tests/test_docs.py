"""The pages say what is: their code runs, and their tables and drawing are those of the files they are about."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from documents import PAGES, ROOT, blocks, examples, literals, quotes_of_no_literal

DOCS = ROOT / "docs"
COMMAND = re.compile("engram [a-z]|make [a-z]|python -m ")
CASES = [(page, name) for page in PAGES for name in examples(page)]


@pytest.fixture
def docs(monkeypatch):
    """Import modules of docs/, which is a folder of pages and not a package."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


def prepared(name: str) -> dict:
    """Objects that the text of an example requires."""
    import engram

    if name == "attach_large":
        from hf_models import build

        config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=512)
        names = {name: getattr(engram, name) for name in ("EngramMemory", "TokenMap")}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}))
        return names | {"engram": engram, "config": config, "model": build("llama"), "tokenizer": tokenizer}
    if name.startswith("attach"):
        from hf_models import build

        return {"engram": engram, "model": build("llama"), "tokenizer": engram.TokenMap.identity(64)}
    return {}


@pytest.mark.parametrize(("page", "name"), CASES, ids=[f"{page.stem}:{name}" for page, name in CASES])
def test_every_example_of_the_pages_runs(page, name, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names = prepared(name)
    for code in examples(page)[name]:
        exec(compile(code, f"{page.name}:{name}", "exec"), names)


def test_no_python_of_the_pages_is_without_a_marker():
    for page in PAGES:
        for marker, _, language, text in blocks(page):
            assert language != "python" or marker == "example", f"{page}: {text}"


def test_the_saved_things_of_the_attach_page_open_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in examples(DOCS / "guides" / "attach.md")["attach"]:
        exec(code, names)
    memory, again, opened = names["memory"], names["again"], names["whole"].model.engram
    assert memory.layout.digest == again.layout.digest == opened.layout.digest
    trained = memory.tables[1].tensor
    assert trained.any() and trained.equal(again.tables[1].tensor) and trained.equal(opened.tables[1].tensor)
    assert memory.attachment is None and names["model"].model.engram is again


def test_the_arm_of_the_pages_builds():
    from engram.addressing import TokenMap
    from engram.lm.run import Setting

    names: dict = {}
    (code,) = examples(DOCS / "guides" / "lab.md")["arm"]
    exec(code, names)
    model = names["ARMS"]["narrow"](Setting(), SimpleNamespace(token_map=TokenMap.identity(4096)))
    assert model.config.hidden_size == Setting().model.hidden_size // 2
    (code,) = examples(DOCS / "guides" / "lab.md")["question"]
    exec(code, names)
    runs = names["configs"](names["SIZE"])
    assert [run.arm for run in runs] == [names["BASELINE"], *names["ARMS"]]


def shell_lines() -> list[tuple[str, list[str]]]:
    """(page, words) of each command on the pages, without comments."""
    texts = ((page, text) for page in PAGES for _, _, language, text in blocks(page) if language == "console")
    lines = ((page, line.lstrip("$ ")) for page, text in texts for line in text.splitlines())
    return [(page.name, shlex.split(line, comments=True)) for page, line in lines if COMMAND.match(line)]


def test_every_command_of_the_pages_exists_with_its_options():
    import typer

    from engram.cli import app
    from experiments.__main__ import parser

    commands = typer.main.get_command(app).commands
    questions = next(action for action in parser()._actions if action.dest == "command").choices
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    seen = set()
    for page, words in shell_lines():
        seen.add(words[0])
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        if words[0] == "engram":
            options = {name for parameter in commands[words[1]].params for name in parameter.opts}
            assert set(given) <= options, (page, words)
        elif words[0] == "make":
            assert words[1] in targets, (page, words)
        else:
            assert words[1:3] == ["-m", "experiments"], (page, words)
            options = {name for action in questions[words[3]]._actions for name in action.option_strings}
            assert set(given) <= options, (page, words)
    assert seen == {"engram", "make", "python"}


def test_the_drawings_are_those_that_their_script_draws(docs):
    pictures = docs("drawings").PICTURES
    assert {path.stem for path in DOCS.glob("*.svg")} == set(pictures)
    for name, draw in pictures.items():
        assert draw() == (DOCS / f"{name}.svg").read_text(), f"{name}: run python docs/drawings.py"


def test_the_numbers_of_the_drawings_are_those_of_the_pages(docs, tmp_path, monkeypatch, capsys):
    numbers = docs("drawn_numbers")
    _, _, rows, layout = numbers.addresses()
    assert len(set(rows)) == 4 and max(rows) < layout.rows[1]
    (code,) = examples(DOCS / "concepts.md")["addresses"]
    exec(code, {})
    assert capsys.readouterr().out.strip() == f"{layout.moduli[1]} {layout.offsets[1]} {np.array(rows)}"
    per_row = dict(re.findall(r"(?m)^\| `?(\w+)`? \| .* \| ([\d,]+) \|$", (DOCS / "guides" / "serve.md").read_text()))
    assert numbers.CONFIG.head_dim * 8 == 256  # values of a row on the page of codecs
    assert {name: f"{size * 8:,}" for name, size in numbers.row_sizes()} == per_row


def test_plan_prints_what_the_pages_show(capsys, monkeypatch):
    from engram.cli import main

    (shown,) = examples(DOCS / "concepts.md", "console")["plan"]
    command, *expected = shown.splitlines()
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ ")))
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main()
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(expected) == 2
    for line in expected:
        assert any(one.startswith(line) for one in printed), line


def test_the_lm_eval_task_of_the_pages_runs(capsys, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[lm-eval]' in the project's folder")
    import datasets
    import tokenizers
    import transformers as hf

    import engram
    from engram.cli import main

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    page = DOCS / "guides" / "evaluate.md"
    (block,) = examples(page, "yaml")["task"]
    task, data = re.findall(r"# (\S+); its data is (\S+):", block)[0]
    Path(task).parent.mkdir()
    Path(task).write_text(block)
    Path(data).write_text(next(line.removeprefix("# ") for line in block.splitlines() if line.startswith("# {")))
    letters = {letter: i for i, letter in enumerate(map(chr, range(32, 127)))}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="~")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=95, max_position_embeddings=64, **shape))
    model.save_pretrained("models/llama")
    tokenizer.save_pretrained("models/llama")
    engram.attach(model, engram.EngramConfig(layers=(1,), heads=2, head_dim=8), tokenizer).save("adapter")
    (console,) = examples(page, "console")["task"]
    monkeypatch.setattr(sys, "argv", shlex.split(console.splitlines()[1].removeprefix("$ ")))
    with pytest.raises(SystemExit) as end:
        main()
    report = json.loads(capsys.readouterr().out)
    assert not end.value.code and [row["metric"] for row in report["results"]] == ["acc", "acc_norm"]


def test_the_tables_of_versions_are_those_of_the_constraints():
    oldest, pinned = (
        set(re.findall(r"(?m)^([\w-]+)==([^\s;]+)", (ROOT / name).read_text()))  # of one package for several Pythons
        for name in ("constraints-oldest.txt", "constraints.txt")
    )
    lines = re.findall(r"(?m)^\| (\w+) \| (\d[\d.]*) \| (\d[\d.]*) \|", (DOCS / "index.md").read_text())
    readme = (ROOT / "README.md").read_text()
    names, first, second = (
        re.findall(r"[\w.]+", re.search(rf"(?m)^\|\s*{head}\s*\|(.+)$", readme)[1]) for head in ("", "oldest", "pinned")
    )
    assert lines == list(zip(names, first, second, strict=True)) and len(lines) == 7
    for name, low, high in lines:
        assert (name, low) in oldest and (name, high) in pinned, name


def test_every_message_of_the_troubleshooting_table_is_one_that_the_library_prints():
    page = (DOCS / "troubleshooting.md").read_text()
    texts = [text for file in (ROOT / "engram").rglob("*.py") for text in literals(file.read_text())]
    assert len(re.findall("(?m)^\\| .*“", page)) >= 15
    assert quotes_of_no_literal(page, texts) == [], "a message was reworded: change the table with it"


@pytest.mark.parametrize(
    ("source", "quote", "found"),
    [
        ('raise ValueError(f"{path} was changed by {who}: read it again")', "... was changed by ...: read", True),
        ('raise ValueError(f"{path} was altered by {who}: read it again")', "... was changed by ...: read", False),
        ('warn(f"{path} holds " f"rows")', "... holds rows", True),
        ('warn("it holds rows")', "... holds rows", False),  # no value before it
        ('warn("it holds rows")', "it holds rows", True),
        ('warn(f"it {x} rows")', "it holds rows", False),
        ('def f():\n    """The rows are held."""', "rows are held", False),
        ('"""The rows are held."""\nwarn(f"no {x}")', "rows are held", False),
    ],
)
def test_a_quote_is_found_in_the_messages_that_can_print_it(source, quote, found):
    page = f"# Page\n\n| “{quote}” | cause |\n"
    assert quotes_of_no_literal(page, literals(source)) == ([] if found else [f"line 3: {quote}"])


def test_every_public_name_is_in_the_reference(docs):
    import engram

    named = [name for _, names in docs("generate").API.values() for name in names]
    assert len(named) == len(set(named))
    assert not set(engram.__all__) - set(named), "add the name to API in docs/generate.py"


def test_each_question_gets_a_page_with_its_verdicts_and_limits(docs):
    generate = docs("generate")
    homes = [*generate.questions(), *generate.scripts()]
    assert len(generate.questions()) >= 11 and len(generate.scripts()) >= 4
    for home in homes:
        question = home not in generate.scripts()
        page = generate.question_page(home, DOCS / "results" / f"{home.name}.md")
        assert page.startswith("# ") and page.count("\n# ") == 0, home
        assert "<!--" not in page and ("figure.png)" in page or not question), home
        reading = page.partition("\n## ")[0]
        assert "`report` writes" not in reading and not re.search(r"\n\n[a-z]", reading), home
        assert "\n**Answer.** " in page and "\n## What this does not show" in page, home
        assert "\n## What the runs say about the claims" in page or not question, home
        for target in re.findall(r"\]\(([^)#:]+)\)", page):
            if not target.startswith("../notes/") and not target.endswith(".md"):
                assert Path(os.path.normpath(DOCS / "results" / target)).exists(), target


def test_the_answer_is_the_one_bold_sentence_of_the_reading(docs):
    answer = docs("generate").answer
    reading = "Rows are compared. **Loss falls with every\ndoubling (0.2 of it, say): it is a curve.** More follows."
    assert answer("slots", reading) == "Loss falls with every doubling (0.2 of it, say): it is a curve."
    for text in ("Rows are compared.", "**Rows** are compared.", "**One.** And **two.**"):
        with pytest.raises(ValueError, match=r"experiments/slots/README\.md: .* in \*\*bold\*\*"):
            answer("slots", text)


def test_links_of_the_repository_become_links_of_the_site(docs):
    linked = docs("generate").linked
    source, page = ROOT / "experiments" / "slots" / "README.md", DOCS / "results" / "slots.md"
    assert linked("[c](../../paper_notes/claims.md)", source, page) == "[c](../notes/claims.md)"
    assert linked("[s](../sceptic/README.md)", source, page) == "[s](sceptic.md)"
    assert linked("![f](figure.png)", source, page) == "![f](../../experiments/slots/figure.png)"
    assert linked("[`../arms/README.md`](../arms/README.md)", source, page) == "`experiments/arms/README.md`"
    assert linked("[g](../../docs/guides/lab.md)", source, page) == "[g](../guides/lab.md)"
    assert linked("[the arms](../arms/README.md)", source, page) == "the arms (`experiments/arms/README.md`)"
    for kept in ("[x](https://example.org/a)", "[y](#part)", "no link"):
        assert linked(kept, source, page) == kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return |x| of *args.", ["Return \\|x\\| of \\*args.", ""]),
        ("A `name_` and `b`s.", ["A ``name_``\\  and ``b``\\ s.", ""]),
        ("Do.\n\nArgs:\n    a, b: one\n        two.\n    c: three.", ["* **a, b**: one two.", "* **c**: three."]),
        ("Do.\n\nExample:\n    >>> 1 * 2\n    2", [".. code-block:: python", "   >>> 1 * 2"]),
        (
            "Rows.\n\na_long_name:   kept as it is\nb:             too",
            [".. code-block:: text", "   b:             too"],
        ),
        (
            "Do.\n\nRaises:\n    ValueError: bad x. OSError: no disk,\n    or a slow one.",
            ["* **ValueError**: bad x. OSError: no disk, or a slow one."],
        ),
    ],
)
def test_docstrings_hold_no_markup_but_code(text, expected, docs):
    lines = docs("docstrings").to_rst(text.splitlines())
    for line in expected:
        assert line in lines, lines


def test_the_hosted_workflow_calls_the_script_of_ci():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"- run: (.+)", workflow) == [".ci/run"]
    assert (ROOT / ".ci" / "run").read_text().count("\nmake docs") == 1
