"""What each room may import: nothing above its floor, and no modules import each other in a circle."""

from __future__ import annotations

import graphlib
from functools import cache

import grimp
import pytest

# From the ground up. Rooms that share a floor do not import each other.
FLOORS = (
    {"_command", "_moved", "_version"},
    {"storage"},
    {"config", "device"},
    {"tables"},
    {"addressing", "fusion"},
    {"memory"},
    {"optimizer"},
    {"lm", "integrations"},
    {"inspect"},
    {"ablation", "benchmarks"},
    {""},  # engram/__init__.py
    {"cli"},
    {"__main__"},
)


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
