"""The walls between the package's parts, its public names, and what an import of it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
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
                yield Import(alias.name, (), in_function, for_types)
        elif isinstance(child, ast.ImportFrom):
            names = tuple(alias.name for alias in child.names)
            base = child.module or ""
            if child.level:
                above = module.split(".")[: len(module.split(".")) - child.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            yield Import(base, names, in_function, for_types)
        else:
            inside = in_function or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            typing = for_types or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from _imports(child, module, is_package, inside, typing)


def part(module: str) -> str:
    """Return which part of the package *module* is of: ``core``, or a sibling that stands on it."""
    _, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    return first if first and not first.startswith("_") and first != "events" else "core"


def own_imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the modules of the package that *file* imports when it is imported, and the names."""
    modules = {module_name(each) for each in FILES}
    for each in imports(file):
        if each.package != "lifekit" or each.for_types:
            continue
        submodules = [name for name in each.names if f"{each.module}.{name}" in modules]
        for name in submodules:
            yield f"{each.module}.{name}", ()
        names = tuple(name for name in each.names if name not in submodules)
        if names or not each.names:
            yield each.module, names


def ids(files: list[Path]) -> list[str]:
    """Return the modules' names, as test ids."""
    return [module_name(file) for file in files]


every_file = pytest.mark.parametrize("file", FILES, ids=ids(FILES))
CORE = [file for file in FILES if part(module_name(file)) == "core"]
PARTS = {"asgi", "drivers", "embedded", "sandbox", "testing"}
SIBLINGS = [file for file in FILES if part(module_name(file)) in PARTS]
STANDS_ON = {"sandbox": {"drivers", "embedded"}, "testing": {"asgi"}}
"""Beside the core, which they all stand on."""

# -- walls -----------------------------------------------------------------------------------------


def test_the_walk_sees_the_package_as_it_is() -> None:
    assert len(CORE) > 10
    assert {part(module_name(file)) for file in SIBLINGS} == PARTS
    seen = dict(own_imports(PACKAGE / "_registry.py"))
    assert seen["lifekit.asgi"] == ("bind_requests",)
    assert seen["lifekit._lifespan"] == ("Lifespan",)
    assert ("lifekit.drivers", ()) in own_imports(PACKAGE / "_closing.py")
    assert "lifekit._redact" in dict(own_imports(PACKAGE / "drivers" / "asyncpg.py"))
    assert Import("starlette.requests", ("HTTPConnection",), True, False) in imports(
        PACKAGE / "_resource.py"
    )


@pytest.mark.parametrize("file", CORE, ids=ids(CORE))
def test_the_core_imports_no_driver_and_no_framework(file: Path) -> None:
    for each in imports(file):
        assert each.package not in DRIVEN | TEST_LIBRARIES
        if each.package in {*FRAMEWORKS, "trio"}:
            assert each.in_function or each.for_types, f"{each.module} at the top of {file.name}"


DOORS = {
    ("lifekit", "lifekit.drivers"): {"Driver"},
    ("lifekit._registry", "lifekit.asgi"): {"bind_requests"},
    ("lifekit._closing", "lifekit.drivers"): set[str](),
    ("lifekit._closing", "lifekit.sandbox._stores"): {"refusal"},
    ("lifekit._engine", "lifekit.drivers"): set[str](),
    ("lifekit._lifespan", "lifekit.drivers"): set[str](),
    ("lifekit._lifespan", "lifekit.sandbox._by_gateway"): {"PostgresSandbox"},
    ("lifekit._life", "lifekit.drivers"): set[str](),
    ("lifekit._transient", "lifekit.drivers"): set[str](),
}


@pytest.mark.parametrize("file", CORE, ids=ids(CORE))
def test_the_core_stands_on_no_other_part_but_by_its_doors(file: Path) -> None:
    for module, names in own_imports(file):
        if part(module) != "core":
            door = DOORS.get((module_name(file), module))
            assert door is not None, f"{module_name(file)} imports {module}"
            assert set(names) <= door


@pytest.mark.parametrize("file", SIBLINGS, ids=ids(SIBLINGS))
def test_the_parts_on_the_core_import_no_other_part_but_what_they_stand_on(file: Path) -> None:
    here = part(module_name(file))
    for module, _ in own_imports(file):
        if (module_name(file), module) not in SANDBOX_DOORS:
            assert part(module) in {"core", here, *STANDS_ON.get(here, ())}, f"{file.name}: {module}"


SANDBOX_DOORS = {(f"lifekit.drivers.{name}", f"lifekit.sandbox.{name}") for name in ("redis",)}


def test_a_driver_imports_its_sandbox_when_one_is_asked_for() -> None:
    for driver, sandbox in SANDBOX_DOORS:
        file = ROOT / f"{driver.replace('.', '/')}.py"
        doors = [each for each in imports(file) if each.module.startswith("lifekit.sandbox")]
        assert {each.module for each in doors} == {sandbox}
        assert all(each.in_function for each in doors)


SHARED = ("_checkouts", "_doors", "_libpq")
DRIVERS = sorted((PACKAGE / "drivers").glob("[a-z]*.py"))


@pytest.mark.parametrize("file", DRIVERS, ids=ids(DRIVERS))
def test_a_driver_imports_no_other_driver(file: Path) -> None:
    for module, _ in own_imports(file):
        shared = {"lifekit.drivers", *(f"lifekit.drivers.{each}" for each in SHARED)}
        own = (module_name(file), module) in SANDBOX_DOORS
        assert part(module) == "core" or own or module in shared


BESIDE = {
    "aiopg": {"psycopg2"},
    "psycopg": {"psycopg_pool"},
    "psycopg_connection": {"psycopg"},
    "sqlalchemy": {"asyncpg"},
}


@pytest.mark.parametrize("file", SIBLINGS, ids=ids(SIBLINGS))
def test_what_a_part_needs_of_other_packages_is_its_own_kind(file: Path) -> None:
    foreign = {each.package for each in imports(file) if not each.for_types and not each.in_function}
    if part(module_name(file)) == "drivers" and file in DRIVERS:
        foreign -= {file.stem, *BESIDE.get(file.stem, ())}
    if part(module_name(file)) == "sandbox":
        package = file.stem.removeprefix("_").partition("_")[0]
        foreign -= {package, *BESIDE.get(package, ())}
    if file.parent == PACKAGE / "testing" and file.stem in ("_pytest", "_loops", "_seeds"):
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
        "Worker",
        "WrongLoopError",
        "stopping",
    ]
    assert lifekit.__all__ == sorted(lifekit.__all__)
    assert all(getattr(lifekit, name).__name__ == name for name in lifekit.__all__)


def test_the_public_names_of_the_parts_are_these() -> None:
    assert asgi.__all__ == ["combine", "health"]
    assert drivers.__all__ == ["Driver", "Gateway", "Sandbox", "Tls", "find", "loaded", "register"]
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
        "Opened": [*of_resource, "seconds", "description"],
        "OpenFailed": [*of_resource, "seconds", "error"],
        "Started": ["registry", "lifespan", "timeline"],
        "Stopping": ["registry", "lifespan"],
        "Closing": of_resource,
        "CloseFailed": [*of_resource, "phase", "error"],
        "Terminated": of_resource,
        "Closed": [*of_resource, "seconds", "clean"],
        "WorkerStarted": of_resource,
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
