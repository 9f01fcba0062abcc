"""lifekit touches no private name of a driver that is not listed, and each that is listed exists."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import lifekit

from .private_names import ELSEWHERE, MOST_IN_TESTS, NAMES, OWN, Private

_PACKAGE = Path(lifekit.__file__).parent
_FILES = [
    *(
        _PACKAGE / "drivers" / f"{name}.py"
        for name in ("asyncpg", "aiopg", "psycopg", "psycopg_connection", "psycopg2", "sqlalchemy")
    ),
    *(_PACKAGE / "drivers" / f"{name}.py" for name in ("__init__", "_checkouts", "_libpq")),
    _PACKAGE / "_sandbox" / "postgres" / "sandbox.py",
    _PACKAGE / "_sandbox" / "waits.py",
    *sorted((_PACKAGE / "_sandbox" / "postgres").glob("*.py")),
]


def _private(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Each private name that is looked up, and whether on ``self``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name):
                yield name, isinstance(value, ast.Name) and value.id in ("self", "cls")
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "Door"), args=[_, second, *_]
            ):
                if isinstance(second, ast.Constant):
                    yield str(second.value), False
            case _:
                pass


def _bound(tree: ast.AST) -> Iterator[str]:
    """The names that classes of the file define themselves."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
            case _:
                pass


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_PACKAGE)))
def test_no_private_name_is_touched_that_is_not_on_the_list(file: Path) -> None:
    tree = ast.parse(file.read_text())
    known = {each.name for each in NAMES} | OWN | ELSEWHERE
    bound = set(_bound(tree))
    found = {
        name
        for name, is_own in _private(tree)
        if re.match("_[^_]", name) and not (is_own and name in bound)
    }
    assert not found - known, f"add {found - known} to tests/drivers/private_names.py, with the reason"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.owner}.{name.name}")
def test_each_name_on_the_list_is_still_there(name: Private) -> None:
    module, _, kind = name.owner.rpartition(".")
    owner: Any = getattr(import_module(module), kind)
    source = "".join(
        inspect.getsource(each) for each in owner.__mro__ if each.__module__.startswith(module[:6])
    )
    assert re.search(rf"\b{name.name}\b", source), (
        f"{name.owner} has no {name.name} any more, by which lifekit {name.reason}: read what took its "
        f"place, and change lifekit/drivers and tests/drivers/private_names.py"
    )


def test_each_name_on_the_list_is_used_and_test_mode_uses_few() -> None:
    used = {name for file in _FILES for name, _ in _private(ast.parse(file.read_text()))}
    assert not [each for each in NAMES if each.name not in used]
    assert sum(each.in_tests for each in NAMES) <= MOST_IN_TESTS
