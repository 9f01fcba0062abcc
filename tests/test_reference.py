"""Whatever is public has its place in the reference: names, members, options, fixtures, extras."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import zlib
from functools import cache
from typing import Any

import pytest

import lifekit
from lifekit import pytest_plugin

from .pages import DOCS, ROOT, plain, sections

PAGE = DOCS / "reference.md"
MODULES = (
    *("lifekit", "lifekit.asgi", "lifekit.drivers"),
    *("lifekit.embedded", "lifekit.events", "lifekit.testing"),
)
BUILD = """
import sys
from mkdocs.commands.build import build
from mkdocs.config import load_config
build(load_config(sys.argv[1], docs_dir=sys.argv[2], site_dir=sys.argv[3], strict=False))
"""
INNER = {
    *("lifekit.Registry.plan", "lifekit.Resource.factory", "lifekit.Resource.needs"),
    *("lifekit.Resource.after", "lifekit.Resource.options", "lifekit.Resource.registry"),
    *("lifekit.Lifespan.declares", "lifekit.Lifespan.sandboxes", "lifekit.Lifespan.undo"),
    *("lifekit.Registry.place", "lifekit.Registry.add"),
    *("lifekit.Lifespan.checks", "lifekit.Lifespan.crashed", "lifekit.Stopping.mark"),
    *("lifekit.Lifespan.interrupted", "lifekit.Lifespan.has_crashed", "lifekit.Lifespan.refuse_again"),
    *("lifekit.Stopping.set", "lifekit.Stopping.forget", "lifekit.CrashError.derive"),
    *(f"lifekit.Worker.{name}" for name in ("factory", "needs", "after", "options", "registry")),
    *(f"lifekit.Worker.{name}" for name in ("get", "name", "location", "rules")),  # of a Resource
    *(f"lifekit.Lifespan.{name}" for name in ("busy", "changed", "next_generation")),
    *("lifekit.Lifespan.variables", "lifekit.Lifespan.location"),
    *("lifekit.StartupError.derive", "lifekit.ShutdownError.derive"),  # ExceptionGroup's
    "lifekit.events.log",
}
"""What lifekit's own parts use of each other, and begins with no underscore."""


@dataclasses.dataclass(frozen=True)
class Built:
    """The reference as it is built: the names that can be linked to, and the text below each."""

    names: frozenset[str]
    texts: dict[str, str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The one page, built alone."""
    docs, site = (tmp_path_factory.mktemp(name) for name in ("docs", "site"))
    (docs / PAGE.name).write_bytes(PAGE.read_bytes())
    command = [sys.executable, "-c", BUILD, str(ROOT / "mkdocs.yml"), str(docs), str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    page = (site / "reference.html").read_text("utf-8")
    _, *parts = re.split(r'<h[2-4][^>]* id="([^"]+)"', page)
    texts = {name: re.sub(r"<[^>]+>", "", text) for name, text in zip(*[iter(parts)] * 2, strict=True)}
    return Built(frozenset(names), texts)


# -- names -----------------------------------------------------------------------------------------


def _public(module: Any) -> list[str]:
    """Return ``__all__``, or the classes and functions that are the module's own."""
    members: dict[str, Any] = module.__dict__
    own = [
        name
        for name, value in members.items()
        if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == module.__name__
    ]
    names: list[str] = members.get("__all__", own)
    return [name for name in names if not name.startswith("_")]


def _names() -> dict[str, Any]:
    """Return all that is public, by its full name."""
    found: dict[str, Any] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        found |= {f"{path}.{name}": getattr(module, name) for name in _public(module)}
    return {name: value for name, value in found.items() if name not in INNER}


def _classes() -> dict[str, type]:
    """Return the public classes, and those that a public one gives."""
    found = {name: value for name, value in _names().items() if inspect.isclass(value)}
    del found["lifekit.drivers.Driver"]  # which is lifekit.Driver
    given = (
        *("options.Declaration", "options.WorkerDeclaration"),
        *("worker.WorkerStatus", "health.ResourceHealth", "timeline.Timeline", "timeline.Span"),
    )
    for path in given:
        module, _, name = f"lifekit._core.{path}".rpartition(".")
        found[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    return found


def _methods(kind: type) -> list[str]:
    """Return its own methods and properties."""
    own = {
        name: value
        for base in kind.__mro__
        if base.__module__.startswith("lifekit")
        for name, value in vars(base).items()
    }
    return [
        name
        for name, value in own.items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    ]


def test_the_modules_are_those_that_are_public() -> None:
    parts = {name.removeprefix("lifekit.") for name in MODULES} - {"lifekit"}
    assert {name for name in dir(lifekit) if inspect.ismodule(getattr(lifekit, name))} >= parts
    public = {path.stem for path in (ROOT / "lifekit").glob("[!_]*") if path.stem != "py"}
    assert public == parts | {"pytest_plugin"}  # which has its fixtures


@pytest.mark.parametrize("name", _names())
def test_a_public_name_has_its_place(name: str, built: Built) -> None:
    assert name in built.names


@pytest.mark.parametrize("name", _classes())
def test_the_methods_of_a_public_class_have_their_places(name: str, built: Built) -> None:
    """With what stands before a method in its bases, but not what Python's own bases have."""
    wanted = {f"{name}.{method}" for method in _methods(_classes()[name])} - INNER
    assert sorted(wanted - built.names) == []


@pytest.mark.parametrize("name", [name for name, each in _classes().items() if each.__doc__])
def test_the_fields_of_a_public_class_are_told(name: str, built: Built) -> None:
    """In its signature, in a place of their own, or in the words of its docstring."""
    fields = {
        field for field in _fields(_classes()[name]) if f"{name}.{field}" not in built.names | INNER
    }
    told = built.texts.get(name, "")
    assert {field for field in fields if not re.search(rf"\b{field}\b", told)} == set()


def _fields(kind: type) -> set[str]:
    """Return the public attributes that an instance has, as far as its class says."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("lifekit")]
    found: set[str] = {key for base in bases for key in vars(base).get("__annotations__", ())}
    if issubclass(kind, lifekit.LifekitError):
        for function in filter(
            inspect.isfunction, [each for base in bases for each in vars(base).values()]
        ):
            found |= set(re.findall(r"\bself\.([a-z]\w*)\b[^=\n]*= ", inspect.getsource(function)))
    return {name for name in found if not name.startswith("_")}


# -- pytest ----------------------------------------------------------------------------------------


class Parser:
    """What `pytest_addoption` declares."""

    def __init__(self) -> None:
        self.ini: list[str] = []
        self.options: list[str] = []

    def addini(self, name: str, *_: object, **__: object) -> None:
        self.ini.append(name)

    def addoption(self, *names: str, **_: object) -> None:
        self.options += names

    def getgroup(self, *_: object, **__: object) -> Parser:
        return self


def _declared() -> Parser:
    parser: Any = Parser()
    pytest_plugin.pytest_addoption(parser)
    declared: Parser = parser
    return declared


def _headings(section: str) -> str:
    return "\n".join(re.findall(r"^#+ .+$", sections(PAGE)[section], re.M))


def test_an_ini_option_of_the_plugin_has_its_place() -> None:
    assert sorted(_declared().ini) == ["lifekit_app", "lifekit_workers"]
    for name in _declared().ini:
        assert f"Ini line: `{name}`" in _headings("pytest")
        assert re.search(rf"^{name} = ", sections(PAGE)["pytest"], re.M)


def test_a_command_line_option_of_the_plugin_has_its_place() -> None:
    missing = [name for name in _declared().options if f"`{name}`" not in sections(PAGE)["pytest"]]
    assert missing == []
    said = "It adds no command-line option to pytest." in sections(PAGE)["pytest"]
    assert said == (not _declared().options)


def test_a_marker_of_the_plugin_has_its_place(pytestconfig: pytest.Config) -> None:
    lines: list[str] = pytestconfig.getini("markers")
    own = [line for line in lines if line.startswith("lifekit")]
    assert own
    for line in own:
        name, keywords = re.findall(r"^(\w+)\(([^)]*)\)", line)[0]
        assert f"Marker: `@pytest.mark.{name}`" in _headings("pytest")
        assert f"`@pytest.mark.{name}({keywords})`" in sections(PAGE)["pytest"]
    for isolation in pytest_plugin._ISOLATIONS:  # pyright: ignore[reportPrivateUsage]
        assert f'isolation="{isolation}"' in sections(PAGE)["pytest"]


FIXTURES = [
    name
    for name, value in vars(pytest_plugin).items()
    if type(value).__name__ == "FixtureFunctionDefinition" and not name.startswith("_")
]


def test_the_fixtures_are_found() -> None:
    assert {"client", "sync_client", "lifespan", "sandbox", "lifekit_app"} <= set(FIXTURES)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_has_its_place_with_its_text(name: str, built: Built) -> None:
    full = f"lifekit.pytest_plugin.{name}"
    assert full in built.names
    text = getattr(pytest_plugin, name).__doc__.partition("\n")[0]
    assert re.sub(r"`", "", text).removesuffix(".") in plain(built.texts[full])


# -- the environment, and what is installed --------------------------------------------------------


@cache
def _variables() -> set[str]:
    """Return the environment variables that lifekit's code reads by name."""
    found: set[str] = set()
    sources = [path.read_text("utf-8") for path in (ROOT / "lifekit").rglob("*.py")]
    for source in (each for each in sources if re.search(r"environ|getenv", each)):
        for node in ast.walk(ast.parse(source)):
            told = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript | ast.Compare) else ""
            found |= set(re.findall(r"environb?(?:\.get\(|\.pop\(|\[)'(\w+)'", told))
            found |= set(re.findall(r"getenvb?\('(\w+)'", told))
            found |= set(re.findall(r"'(\w+)' in os\.environ", told))
    return found


def test_an_environment_variable_that_lifekit_reads_has_its_place() -> None:
    section = sections(PAGE)["Environment variables"]
    assert {name for name in _variables() if f"`{name}`" not in section} == set()
    assert ("lifekit itself reads none" in section) == (not _variables())


def test_an_optional_extra_has_its_row_with_what_it_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", sections(PAGE)["Optional extras"], re.M))
    assert rows.keys() == extras.keys() - {"dev"}
    for extra, told in rows.items():
        packages = {re.split(r"[<>=!~\[; ]", each)[0] for each in extras[extra]}
        assert packages - {"anyio"} == set(re.findall(r"[\w-]+", told)) - {"with"}, extra
