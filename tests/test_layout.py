"""The walls between the package's parts, its public names, and what an import of it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

import lifekit
from lifekit import asgi, drivers, events, testing

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lifekit"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text("utf-8")) for file in FILES}

DRIVEN = {
    "aiopg",
    "aiosqlite",
    "asyncpg",
    "fakeredis",
    "httpx",
    "httpx2",
    "psycopg",
    "psycopg2",
    "psycopg_pool",
    "redis",
    "sqlalchemy",
}
FRAMEWORKS = {"fastapi", "starlette"}
TEST_LIBRARIES = {"_pytest", "hypothesis", "pytest"}


class Import(NamedTuple):
    """One imported module, and what is taken from it."""

    module: str
    names: tuple[str, ...]
    in_function: bool
    for_types: bool
    line: int = 0

    @property
    def package(self) -> str:
        """The distribution's own package."""
        return self.module.partition(".")[0]


def module_name(file: Path) -> str:
    """Return the dotted name of the module in *file*."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> list[Import]:
    """Return everything that *file* imports."""
    return list(_imports(TREES[file], module_name(file), file.name == "__init__.py", False, False))


def _imports(
    node: ast.AST, module: str, is_package: bool, in_function: bool, for_types: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), in_function, for_types, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(alias.name for alias in child.names)
            base = child.module or ""
            if child.level:
                above = module.split(".")[: len(module.split(".")) - child.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            yield Import(base, names, in_function, for_types, child.lineno)
        else:
            inside = in_function or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            typing = for_types or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from _imports(child, module, is_package, inside, typing)


def part(module: str) -> str:
    """Return which part of the package *module* is of; an import of lifekit itself is the core's."""
    first = module.split(".")[1:2]
    return "_core" if first in ([], ["events"]) else first[0]


def meant(each: Import) -> Iterator[str]:
    """Yield the modules of the package that an import means."""
    for name in each.names or ("",):
        module = f"{each.module}.{name}"
        yield module if module in MODULES else each.module


@cache
def own_imports(file: Path) -> list[tuple[str, Import]]:
    """Return the modules of the package that *file* imports."""
    own = (each for each in imports(file) if each.package == "lifekit")
    found = ((module, each) for each in own for module in meant(each))
    return [(module, each) for module, each in found if module != module_name(file)]


def ids(files: list[Path]) -> list[str]:
    """Return the modules' names, as test ids."""
    return [module_name(file) for file in files]


every_file = pytest.mark.parametrize("file", FILES, ids=ids(FILES))
MODULES = {module_name(file): file for file in FILES}
CORE = [file for file in FILES if part(module_name(file)) == "_core"]
STANDS_ON = {
    "_util": set[str](),
    "_core": {"_util"},
    "embedded": {"_util"},
    "drivers": {"_core", "_util"},
    "asgi": {"_core", "_util"},
    "_sandbox": {"_core", "_util", "drivers", "embedded"},
    "testing": {"_core", "_util", "_sandbox"},
    "pytest_plugin": {"_core", "testing"},
}
"""What each part may import, beside itself, for types and in functions too."""

# -- walls -----------------------------------------------------------------------------------------


def test_the_walk_sees_the_package_as_it_is() -> None:
    assert {part(module) for module in MODULES} == STANDS_ON.keys()
    assert min(sum(part(each) == name for each in MODULES) for name in ("_core", "drivers")) > 10
    seen = dict(own_imports(MODULES["lifekit._core.registry"]))
    assert seen["lifekit._core.requests"].names == ("bind_requests",)
    assert seen["lifekit.events"].for_types
    assert "lifekit._util.redact" in dict(own_imports(MODULES["lifekit.drivers.asyncpg"]))
    assert "lifekit._core.drivers" in dict(own_imports(MODULES["lifekit._core.value"]))
    [lazy] = [each for each in imports(MODULES["lifekit._core.resource"]) if each.in_function]
    assert lazy[:4] == ("starlette.requests", ("HTTPConnection",), True, False)


@every_file
def test_a_part_imports_what_it_stands_on_and_no_other(file: Path) -> None:
    if file == PACKAGE / "__init__.py":  # which names them all
        return
    here = part(module_name(file))
    for module, each in own_imports(file):
        assert part(module) in {here, *STANDS_ON[here]}, f"line {each.line}: {module}"


def test_imports_go_round_in_no_circle() -> None:
    TopologicalSorter(
        {
            name: {
                module
                for module, each in own_imports(file)
                if not each.for_types and not each.in_function
            }
            for name, file in MODULES.items()
        }
    ).prepare()


@cache
def reached(module: str) -> set[str]:
    """Return all that *module* reaches by imports, those for types and in functions too."""
    found, left = set[str](), [module]
    while left:
        for name in (name for name, _ in own_imports(MODULES[left.pop()])):
            if name not in found:
                found.add(name)
                left.append(name)
    return found


@every_file
def test_an_import_for_types_that_goes_back_says_why(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    for module, each in own_imports(file):
        if each.for_types and module_name(file) in reached(module):
            assert "#" in lines[each.line - 1], lines[each.line - 1].strip()


@pytest.mark.parametrize("file", CORE, ids=ids(CORE))
def test_the_core_imports_no_driver_and_no_framework(file: Path) -> None:
    for each in imports(file):
        assert each.package not in DRIVEN | TEST_LIBRARIES
        if each.package in {*FRAMEWORKS, "trio"}:
            assert each.in_function or each.for_types, f"{each.module} at the top of {file.name}"


SHARED = {f"lifekit.drivers.{name}" for name in ("_checkouts", "_doors", "_libpq", "_lock")}
DRIVERS = sorted((PACKAGE / "drivers").glob("[a-z]*.py"))


@pytest.mark.parametrize("file", DRIVERS, ids=ids(DRIVERS))
def test_a_driver_imports_no_other_driver(file: Path) -> None:
    for module, _ in own_imports(file):
        assert part(module) != "drivers" or module in SHARED


BESIDE = {
    "aiopg": {"psycopg2"},
    "psycopg": {"psycopg_pool"},
    "psycopg_connection": {"psycopg"},
    "sqlalchemy": {"asyncpg"},
}


OF_REDIS = {"client", "gate", "lease"}


@pytest.mark.parametrize("file", [file for file in FILES if file not in CORE])
def test_what_a_part_needs_of_other_packages_is_its_own_kind(file: Path) -> None:
    foreign = {each.package for each in imports(file) if not each.for_types and not each.in_function}
    if file in DRIVERS:
        foreign -= {file.stem, *BESIDE.get(file.stem, ())}
    if file.parent == PACKAGE / "_sandbox" / "redis" and file.stem in OF_REDIS:
        foreign -= {"redis"}
    if file == PACKAGE / "_sandbox" / "sqlite" / "engines.py":
        foreign -= {"sqlalchemy"}
    if file.stem in ("_pytest", "_loops", "_seeds", "pytest_plugin"):
        foreign -= {"pytest"}
    assert not foreign & (DRIVEN | FRAMEWORKS | TEST_LIBRARIES | {"trio"})


def test_importing_lifekit_imports_no_driver_no_framework_and_no_test_library() -> None:
    absent = sorted(DRIVEN | FRAMEWORKS | TEST_LIBRARIES | {"trio", "uvloop"})
    code = f"import sys, lifekit; print(*sys.modules.keys() & {set(absent)})"
    command = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.check_output(command, text=True).split() == []


# -- public names ----------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert lifekit.__all__ == [
        "CrashError",
        "DeadlineError",
        "DeclarationError",
        "Driver",
        "Health",
        "Leadership",
        "LifekitError",
        "Lifespan",
        "NotOpenError",
        "OverrideError",
        "Registry",
        "Resource",
        "SandboxBusyError",
        "SandboxError",
        "SandboxEscapedError",
        "SandboxUnsupportedError",
        "ShutdownError",
        "StartupError",
        "Stopping",
        "UnavailableError",
        "Worker",
        "WrongLoopError",
        "exclusive",
        "leadership",
        "stopping",
    ]
    assert lifekit.__all__ == sorted(lifekit.__all__)
    assert all(getattr(lifekit, name).__name__ == name for name in lifekit.__all__)


def test_the_public_names_of_the_parts_are_these() -> None:
    assert asgi.__all__ == ["combine", "health", "lifespan_of"]
    assert drivers.__all__ == [
        *("Driver", "Gateway", "Lock", "Sandbox", "Tls"),
        *("find", "loaded", "register"),
    ]
    assert testing.__all__ == [
        "Sandboxing",
        "client",
        "fake_redis",
        "mock",
        "sandboxing",
        "seed",
        "sync_client",
    ]


def test_the_events_are_these_with_these_fields() -> None:
    of_resource = ["registry", "lifespan", "resource"]
    classes = get_args(events.Event)
    assert {
        each.__name__: [field.name for field in fields(each)] for each in get_args(events.Event)
    } == {
        "Opening": of_resource,
        "Blocked": [*of_resource, "phase", "seconds", "line"],
        "Retrying": [*of_resource, "attempt", "delay", "error"],
        "Unavailable": [*of_resource, "error", "delay"],
        "Renewed": [*of_resource, "seconds"],
        "RenewalFailed": [*of_resource, "error"],
        "HeldTooLong": [*of_resource, "seconds", "holders"],
        "Opened": [*of_resource, "seconds", "description"],
        "OpenFailed": [*of_resource, "seconds", "error"],
        "Started": ["registry", "lifespan", "timeline"],
        "StopNoticed": ["registry", "lifespan", "reason", "from_outside"],
        "Stopping": ["registry", "lifespan"],
        "Closing": of_resource,
        "CloseFailed": [*of_resource, "phase", "error"],
        "Terminated": of_resource,
        "Closed": [*of_resource, "seconds", "clean"],
        "WorkerStarted": of_resource,
        "Leading": [*of_resource, "number"],
        "LeadershipLost": [*of_resource, "number", "reason"],
        "WorkerFailed": [*of_resource, "error", "delay"],
        "WorkerEnded": [*of_resource, "state"],
        "Crashed": [*of_resource, "error", "on_crash"],
        "Stopped": ["registry", "lifespan", "timeline"],
    }
    public: dict[str, Any] = {
        name: value
        for name, value in vars(events).items()
        if isinstance(value, type) and value.__module__ == events.__name__ and name[0] != "_"
    }
    assert set(public.values()) == set(classes)


def test_every_error_is_a_lifekit_error() -> None:
    errors = [getattr(lifekit, name) for name in lifekit.__all__ if name.endswith("Error")]
    assert all(issubclass(error, lifekit.LifekitError) for error in errors)
    assert issubclass(lifekit.StartupError, ExceptionGroup)
    assert issubclass(lifekit.ShutdownError, ExceptionGroup)
    assert issubclass(lifekit.CrashError, ExceptionGroup)
    assert issubclass(lifekit.DeadlineError, TimeoutError)


# -- every file ------------------------------------------------------------------------------------


def undocumented(node: ast.AST, path: str) -> Iterator[str]:
    """Yield the public classes, functions and methods under *node* that have no docstring."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") or "overload" in map(ast.unparse, child.decorator_list):
            continue
        here = f"{path}.{child.name}"
        if not ast.get_docstring(child):
            yield here
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, here)


@every_file
def test_every_public_thing_has_a_docstring(file: Path) -> None:
    assert ast.get_docstring(TREES[file])
    assert list(undocumented(TREES[file], module_name(file))) == []


@every_file
def test_no_file_is_longer_than_600_lines_and_no_function_than_60(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= 600
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [each for each in ast.walk(node) if isinstance(each, ast.ClassDef)]
            assert length(node) - sum(map(length, inner)) < 60, node.name


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Return how many lines it goes on after its first."""
    return (node.end_lineno or 0) - node.lineno


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_no_file_names_a_place_on_the_machine_it_was_written_on() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")
    places = {f"{place}/" for place in (Path.home(), ROOT) if place != place.parent}
    a_home = re.compile(r"/(?:home|Users)/\w|\b[A-Z]:\\Users\\")
    found: list[str] = []
    for name in filter(None, names):
        file = ROOT / name
        text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
        if a_home.search(text) or any(place in text for place in places):
            found.append(name)
    assert found == []
