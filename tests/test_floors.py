"""What each room may import, and how long modules and functions are: nothing is imported from above a room's floor, and
no modules import each other in a circle.
"""

from __future__ import annotations

import ast
import graphlib
from functools import cache
from pathlib import Path

import grimp
import pytest

# From the ground up. Rooms that share a floor do not import each other.
FLOORS = (
    {"_command", "_extras", "_moved", "_version"},
    {"storage"},
    {"config", "device"},
    {"tables"},
    {"addressing", "counts", "fusion"},
    {"memory"},
    {"optimizer"},
    {"lm", "integrations"},
    {"inspect"},
    {"ablation", "benchmarks"},
    {""},  # engram/__init__.py
    {"cli"},
    {"__main__"},
)

ROOT = Path(__file__).parent.parent
MODULE_LINES, FUNCTION_LINES = 350, 60  # docstrings of functions are not counted
LONG_MODULES: set[str] = set()
LONG_FUNCTIONS = {
    "engram/cli/training.py ablate",  # a list of arguments
    "engram/lm/train.py train",  # a training loop
}


@cache
def imports() -> dict[str, set[str]]:
    """{module: modules that it imports}, imports inside functions and for type checking included."""
    graph = grimp.build_graph("engram", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def upward(edges: dict[str, set[str]]) -> list[str]:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        f"{module} imports {other}"
        for module, others in sorted(edges.items())
        for other in sorted(others)
        if room(module) != room(other) and floor[room(other)] >= floor[room(module)]
    ]


def circle(edges: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_a_floor():
    assert {room(module) for module in imports()} <= set().union(*FLOORS)
    assert len(imports()) > 80


def test_nothing_imports_upwards():
    assert upward(imports()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports()) == []


@pytest.mark.parametrize(
    "module, other",
    [
        ("engram.memory.recall", "engram.lm.train"),
        ("engram.tables.table", "engram.addressing.hasher"),
        ("engram.lm.train", "engram.integrations.formats"),
        ("engram.inspect.explain", "engram.ablation.ablate"),
        ("engram.config", "engram"),
    ],
)
def test_an_import_that_goes_up_is_named(module, other):
    edges = imports() | {module: imports()[module] | {other}}
    assert upward(edges) == [f"{module} imports {other}"]


@pytest.mark.parametrize("pair", [("memory.memory", "memory.recall"), ("lm.corpus", "lm.run"), ("config", "fusion")])
def test_a_circle_is_found(pair):
    first, second = (f"engram.{name}" for name in pair)
    edges = imports() | {first: imports()[first] | {second}, second: imports()[second] | {first}}
    assert {first, second} <= set(circle(edges))


def long_parts(root: Path) -> tuple[set[str], set[str]]:
    """Return (modules, functions) below a folder that are longer than the limits."""
    modules, functions = set(), set()
    for path in [*(root / "engram").rglob("*.py"), *(root / "experiments").rglob("*.py")]:
        name, source = path.relative_to(root).as_posix(), path.read_text()
        if len(source.splitlines()) > MODULE_LINES:
            modules.add(name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > FUNCTION_LINES:
                functions.add(f"{name} {node.name}")
    return modules, functions


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, its signature included and its docstring not."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def test_modules_and_functions_are_short_but_for_those_with_a_reason():
    assert long_parts(ROOT) == (LONG_MODULES, LONG_FUNCTIONS)


@pytest.mark.parametrize("docstring", [0, 30])
@pytest.mark.parametrize("body", [FUNCTION_LINES - 1, FUNCTION_LINES])
def test_a_long_function_is_found_whatever_its_docstring(body, docstring, tmp_path):
    (tmp_path / "engram").mkdir()
    text = f'    """{"x" + chr(10) * docstring}"""\n' * bool(docstring)
    (tmp_path / "engram" / "x.py").write_text("async def f():\n" + text + "    pass\n" * body)
    assert long_parts(tmp_path) == (set(), {"engram/x.py f"} if body == FUNCTION_LINES else set())


@pytest.mark.parametrize("lines", [MODULE_LINES, MODULE_LINES + 1])
def test_a_long_module_is_found(lines, tmp_path):
    (tmp_path / "experiments" / "one").mkdir(parents=True)
    (tmp_path / "experiments" / "one" / "x.py").write_text("x = 1\n" * lines)
    assert long_parts(tmp_path) == ({"experiments/one/x.py"} if lines > MODULE_LINES else set(), set())
