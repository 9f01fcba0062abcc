"""Suites of real libraries pass in a block, by the gateway's URL alone, but for what is a limit."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import asyncpg
import pytest
from anyio import to_thread

from lifekit import Registry, embedded
from lifekit.testing import sandboxing

pytestmark = [pytest.mark.anyio, pytest.mark.proof, pytest.mark.timeout(600)]

PLUGINS = Path(__file__).with_name("plugins")
NO_END = "it did not run"
"""A transaction waits for another, and that for it, without an end: there is one real connection."""
TWO_AT_ONCE = "another connection has a transaction open"
"""As above, but it ends."""
TEMPORARY = "already exists"
"""A temporary table is there for all clients, after its own has gone as well."""
NO_TRANSACTION = "lifekit's sandbox all runs inside one"
"""CREATE DATABASE runs outside of transactions only."""

SERIALIZABLE = "test_databases::test_transaction_commit_serializable"
WITH_TEMPORARY = "test_databases::test_iterate_outside_transaction_with_temp_table"
SIBLINGS = "test_databases::test_transaction_context_sibling_task_isolation_example"


@dataclass(frozen=True)
class Suite:
    """A library's release, and which of its tests run."""

    sdist: str
    needs: tuple[str, ...]
    tests: tuple[tuple[str, ...], ...]
    """What pytest is told: once for each block, which may hold only so many locks."""
    at_least: int
    limits: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict[str, str])
    conftest: str | None = None

    @property
    def name(self) -> str:
        """The library's name."""
        return self.sdist.partition("==")[0]


SUITES = [
    Suite(
        "databases==0.9.0",
        ("aiosqlite==0.22.1",),
        (("tests/test_databases.py", "-k", "not field and not mapping"),),
        75,
        {
            f"{SIBLINGS}[postgresql+asyncpg]": NO_END,
            f"{SIBLINGS}[postgresql+aiopg]": NO_END,
            f"{SERIALIZABLE}[postgresql+asyncpg]": TWO_AT_ONCE,
            f"{WITH_TEMPORARY}[postgresql+aiopg]": TEMPORARY,
        },
        {"TEST_DATABASE_URLS": "postgresql+asyncpg:{rest}, postgresql+aiopg:{rest}"},
    ),
    Suite(
        "tortoise-orm==1.1.9",
        ("aiosqlite==0.22.1", "iso8601==2.1.0", "pypika-tortoise==0.6.5", "pytz==2026.6"),
        (
            *(
                (f"tests/test_{name}.py",)
                for name in (
                    "basic",
                    "bulk",
                    "concurrency",
                    "manual_sql",
                    "model_methods",
                    "prefetching",
                    "queryset",
                    "relations",
                    "signals",
                    "transactions",
                    "truncate",
                    "unique_together",
                    "update",
                )
            ),
            ("tests/contrib/postgres/test_tsvector_field.py",),
        ),
        290,
        {
            "test_tsvector_field::test_tsvector_generated_sql": NO_TRANSACTION,
            "test_tsvector_field::test_tsvector_generated_field_save": NO_TRANSACTION,
        },
        {"TORTOISE_TEST_DB": "asyncpg:{server}/test_{{}}"},
        "tortoise_conftest.py",
    ),
]


@pytest.fixture
def anyio_backend() -> str:
    """The suites run elsewhere."""
    return "asyncio"


@pytest.fixture(params=SUITES, ids=lambda suite: suite.name)
def suite(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Suite, Path, Path]:
    """A suite, its unpacked sdist, and a directory of what that imports."""
    chosen: Suite = request.param
    name, packages, source = chosen.name, tmp_path / "packages", tmp_path / "source"
    only = ["--no-deps", "--quiet"]
    _pip("download", *only, "--no-binary", name, "--dest", str(tmp_path), chosen.sdist)
    _pip("install", *only, "--target", str(packages), *chosen.needs)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(source, filter="data")
    (unpacked,) = source.iterdir()
    if chosen.conftest is not None:
        (unpacked / "conftest.py").write_text((PLUGINS / chosen.conftest).read_text())
    return chosen, unpacked, packages


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        pytest.skip(f"pip can't {arguments[0]} {arguments[-1]}: {lines[-1] if lines else 'no reason'}")


async def test_the_suite_of_a_library_passes_over_the_gateway(
    suite: tuple[Suite, Path, Path], postgres: embedded.Server, tmp_path: Path
) -> None:
    """What passes over the server passes by the URL of the gateway, but for what is a limit."""
    chosen, source, packages = suite
    url = await _database(postgres.url)
    run = partial(_run, chosen, source, packages, tmp_path / "report.xml")
    real: dict[str, str] = {}
    for tests in chosen.tests:
        real |= await to_thread.run_sync(run, url, tests)
    url = await _database(postgres.url)  # whose sequences are new
    registry = Registry("libraries", close_timeout=60)

    @registry.resource
    def server() -> Any:
        return embedded.postgres(url)

    sandboxed: dict[str, str] = {}
    hang = {name.partition("[")[0] for name, why in chosen.limits.items() if why == NO_END}
    apart = [f"--deselect=tests/{name.replace('::', '.py::')}" for name in hang]
    with sandboxing():
        async with registry.lifespan() as lifespan:
            for tests in chosen.tests:
                async with lifespan.sandbox():
                    by_gateway = lifespan[server].url
                    sandboxed |= await to_thread.run_sync(run, by_gateway, (*tests, *apart))
                assert not await _held(url), f"what {tests} did lasts"
    passed = {name for name, failure in real.items() if not failure}
    failed = {
        name: sandboxed.get(name, "it did not run") for name in passed if sandboxed.get(name, "-")
    }
    print(f"{chosen.sdist}: {len(real)} ran, {len(passed)} passed, {len(failed)} not in the sandbox")
    assert len(passed) >= chosen.at_least, [text for text in real.values() if text][:1]
    assert set(failed) == set(chosen.limits), failed
    for name, error in chosen.limits.items():
        assert error in failed[name]


def _run(
    chosen: Suite, source: Path, packages: Path, report: Path, url: str, tests: tuple[str, ...]
) -> dict[str, str]:
    """Run a suite on the database of a URL, and return what came of each test."""
    rest = url.removeprefix("postgresql:")
    server = rest.rpartition("/")[0]
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PG"))},
        **{key: text.format(rest=rest, server=server) for key, text in chosen.variables.items()},
        "DATABASE_URL": url,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([*map(str, (source, packages)), *inherited]),
        "PGOPTIONS": "-c lock_timeout=15000",  # for what a suite does over connections of its own
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--junit-xml", str(report)]
    loaded = ("no:cacheprovider", "pytest_asyncio.plugin", "pytest_timeout")
    command += [*(f"-p{name}" for name in loaded), "--timeout=30"]
    done = subprocess.run(
        [*command, *tests],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    return _outcomes(report)


_HELD = "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND oid > 16383"


async def _held(url: str) -> list[str]:
    """Return the tables that a database has got."""
    connection = await asyncpg.connect(url)
    try:
        return [row[0] for row in await connection.fetch(_HELD)]
    finally:
        await connection.close()


async def _database(url: str) -> str:
    name = f"library_{secrets.token_hex(4)}"  # short, for it is part of tests' names
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
    finally:
        await admin.close()
    return f"{url.rpartition('/')[0]}/{name}"


def _outcomes(report: Path) -> dict[str, str]:
    """Return the failure of each test that ran, empty where it passed."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            module = case.attrib["classname"].rpartition(".")[2]
            name = f"{module}::{re.sub(r'://[^]-]*', '', case.attrib['name'])}"
            failures = [*case.findall("failure"), *case.findall("error")]
            found[name] = found.get(name, "") + "".join(each.text or "" for each in failures)
    return found
