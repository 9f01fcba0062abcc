# pyright: reportUnknownMemberType=false
"""The how-to pages: their code runs, and does what they say."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg2
import pytest
from asgi_lifespan import LifespanManager
from fastapi import Depends, FastAPI
from how_to import exporter, pages, pages_declared, pages_driver
from sqlalchemy import Engine, create_engine
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lifekit import (
    Registry,
    Resource,
    SandboxUnsupportedError,
    ShutdownError,
    asgi,
    drivers,
    embedded,
    testing,
)
from lifekit.embedded import Server

from .pages import ROOT, blocks

EXAMPLES = ROOT / "docs" / "examples"
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
INCLUDED = re.compile(r'--8<-- "(docs/examples/how_to/(\w+)\.py):(\w+)"')
RUN_BY_A_TEST = {
    "adopt_before",
    "adopt_between",
    "adopt_after",
    "adopt_lifespan",
    "jobs",
    "jobs_app",
    "jobs_worker",
    "jobs_cli",
    "leading",
    "mails_arq",
    "mails_celery",
    "mails_taskiq",
    "mounted",
    "gunicorn_worker",
    "checkout",
    "exporter",
    "test_checkout",
    "library",
    "test_library",
    "optional",
    "test_optional",
    "outbox",
    "test_outbox",
    "pages",
    "pages_driver",
    "pages_declared",
    "serve",
    "stuck",
    "test_fixtures_before",
    "test_fixtures_between",
    "test_fixtures_after",
}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The drivers are asyncio's own."""
    return "asyncio"


@pytest.fixture(scope="module")
def database_url(postgres: Server) -> Iterator[str]:
    """A database of this module's own."""
    with closing(psycopg2.connect(postgres.url)) as connection:
        connection.autocommit = True
        with connection.cursor() as server:
            server.execute("CREATE DATABASE how_to")
            yield urlsplit(postgres.url)._replace(path="/how_to").geturl()
            server.execute("DROP DATABASE how_to")  # which fails while anyone is connected


@pytest.fixture(scope="module")
def environment(database_url: str, valkey: Server) -> dict[str, str]:
    """What names both servers."""
    redis_url = urlsplit(valkey.url)._replace(path="/8").geturl()
    return {"DATABASE_URL": database_url, "REDIS_URL": redis_url}


@pytest.fixture
def servers(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both servers are named in this process."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


# -- the pages ---------------------------------------------------------------------------------


def _page(name: str) -> str:
    return (ROOT / "docs" / "how-to" / f"{name}.md").read_text("utf-8")


def _python(page: Path) -> list[str]:
    return [text for _, text in blocks(page.read_text("utf-8"), "python")]


def _namespace(name: str) -> dict[str, Any]:
    """Return what the short snippets of a page define."""
    namespace: dict[str, Any] = {"__name__": name}
    for text in _python(ROOT / "docs" / "how-to" / f"{name}.md"):
        if not text.startswith("--8<--"):
            exec(compile(text, name, "exec"), namespace)
    return namespace


def test_each_example_is_on_a_page() -> None:
    shown = {name for page in PAGES for _, name, _ in INCLUDED.findall(page.read_text("utf-8"))}
    assert shown == RUN_BY_A_TEST


# -- adopt an existing application -------------------------------------------------------------


@pytest.mark.parametrize("step", ["before", "between", "after", "lifespan"])
async def test_the_application_answers_the_same_after_each_step_of_its_move(
    servers: None, step: str
) -> None:
    app: FastAPI = importlib.import_module(f"how_to.adopt_{step}").app
    async with testing.client(app) as client:
        assert (await client.get("/times/21")).json() == 42


async def test_the_registry_closes_even_if_a_shutdown_handler_fails() -> None:
    registry, closed = Registry(), list[str]()

    @registry.resource
    async def cache() -> AsyncGenerator[str]:
        yield "cache"
        closed.append("cache")

    async def disconnect() -> None:
        assert cache.get() == "cache"
        raise ZeroDivisionError

    app = FastAPI(on_shutdown=[disconnect])
    app.router.lifespan_context = asgi.combine(registry.lifespan, app.router.lifespan_context)
    with pytest.raises(ZeroDivisionError):
        async with testing.client(app):
            pass
    assert closed == ["cache"]


async def test_fastapi_ignores_handlers_beside_a_lifespan() -> None:
    async def connect() -> None:
        raise AssertionError

    async with testing.client(FastAPI(lifespan=Registry().lifespan, on_startup=[connect])):
        pass


def test_starlette_refuses_handlers_with_the_words_on_the_page() -> None:
    arguments: dict[str, Any] = {"on_startup": []}
    with pytest.raises(TypeError) as caught:
        Starlette(**arguments)
    assert f"`TypeError: {caught.value}`" in _page("adopt-an-existing-app")


async def test_a_mounted_application_finds_the_values_of_an_included_registry() -> None:
    namespace = _namespace("adopt-an-existing-app")
    word = namespace["admin"].resource(_word)
    mounted = namespace["app"].routes[-1].app
    mounted.add_api_route("/", word_of(word))
    async with testing.client(namespace["app"]) as client:
        assert (await client.get("/admin/")).json() == "a word"


def _word() -> str:
    return "a word"


def word_of(word: Resource[str]) -> Callable[..., Any]:
    async def route(word: str = Depends(word)) -> str:
        return word

    return route


# -- an application, a worker and a command line -----------------------------------------------


@contextmanager
def _started(*arguments: str, **environment: str) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=EXAMPLES,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _read_until(process: subprocess.Popen[str], pattern: str, times: int = 1) -> str:
    assert process.stdout is not None
    output = ""
    while len(re.findall(pattern, output)) < times:
        line = process.stdout.readline()
        assert line, output
        output += line
    return output


def test_what_the_application_queues_the_worker_does_and_the_command_line_counts(
    environment: dict[str, str], servers: None
) -> None:
    with _started("how_to.jobs_worker", **environment) as worker:
        from how_to.jobs_app import app

        with TestClient(app) as client:
            assert client.post("/mails/ann@example.org").status_code == 202
        _read_until(worker, "sent a mail to ann@example.org")
        worker.terminate()
        # Without the queue's server: it needs none.
        with _started("how_to.jobs_cli", DATABASE_URL=environment["DATABASE_URL"], REDIS_URL="") as cli:
            assert cli.communicate()[0] == "1 mails sent\n"
        assert worker.communicate()[0] == ""
        assert worker.returncode == 0


async def test_a_rehearsal_opens_no_queue(servers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    await _namespace("app-worker-and-cli")["rehearse"]()


# -- tests -------------------------------------------------------------------------------------

SUITES = {
    "checkout": ["test_checkout.py"],
    "library": ["test_library.py"],
    "optional": ["test_optional.py"],
    "outbox": ["test_outbox.py"],
    "adopt_after": [f"test_fixtures_{each}.py" for each in ("before", "between", "after")],
}


def _run_tests(app: str, *arguments: str) -> int:
    options = ["-q", "-W", "error", "--assert=plain"]
    options += [f"-pno:{name}" for name in ("valkey", "cacheprovider", "hypothesispytest")]
    ini = ["-c", str(EXAMPLES / "pytest.ini"), "-o", f"lifekit_app=how_to.{app}:app"]
    return pytest.main([*options, *ini, *arguments])


@pytest.mark.parametrize(("app", "files"), SUITES.items(), ids=SUITES)
def test_the_tests_on_the_pages_pass_and_leave_nothing(
    servers: None,
    database_url: str,
    capfd: pytest.CaptureFixture[str],
    app: str,
    files: list[str],
) -> None:
    status = _run_tests(app, *(str(EXAMPLES / "how_to" / file) for file in files))
    output = capfd.readouterr().out
    assert status == 0, output
    assert re.search(r"^\d+ passed in ", output, re.MULTILINE), output
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT relname FROM pg_stat_user_tables")
        for (table,) in cursor.fetchall():
            cursor.execute(f"SELECT count(*) FROM {table}")
            assert table == "mails" or cursor.fetchone() == (0,)


def test_the_ini_lines_on_a_page_are_those_of_the_examples() -> None:
    [(_, shown)] = blocks(_page("test-with-rollback"), "ini")
    ini = (EXAMPLES / "pytest.ini").read_text("utf-8").splitlines()
    different = [line for line in shown.splitlines() if line not in ini]
    assert different == ["lifekit_app = how_to.checkout:app"]


# -- SQLAlchemy --------------------------------------------------------------------------------


async def test_a_request_whose_commit_fails_is_not_told_that_it_worked(servers: None) -> None:
    from how_to.library import app

    async with testing.client(app, sandbox=True, raise_app_exceptions=False) as client:
        assert (await client.put("/books/Emma")).status_code == 204
        assert (await client.put("/books/Emma")).status_code == 500


async def test_an_engine_on_sqlite_has_a_sandbox_and_one_of_another_dialect_has_none() -> None:
    registry = Registry()

    @registry.resource
    def engine() -> Engine:
        return create_engine("sqlite://")

    @registry.resource
    def encrypted() -> Engine:
        return create_engine("sqlite+pysqlcipher://", module=sqlite3)

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            with pytest.raises(SandboxUnsupportedError, match="pysqlcipher"):
                async with lifespan.sandbox():
                    pass
    with testing.sandboxing(), registry.override(encrypted, create_engine("sqlite://")):
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            pass


# -- a driver ----------------------------------------------------------------------------------


async def test_a_driver_opens_describes_sandboxes_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pages.serving() as (kept, port):
        monkeypatch.setenv("PAGES_PORT", str(port))
        with testing.sandboxing():
            async with pages_driver.registry.lifespan() as lifespan:
                client = lifespan[pages_driver.pages]
                await client.put("home", "welcome")
                async with lifespan.sandbox():
                    assert await client.get("home") == ""
                    await client.put("home", "changed")
                    assert len(kept) == 2
                assert kept == {"main/home": "welcome"}
                assert await client.get("home") == "welcome"
    with pytest.raises(ConnectionError):
        await client.ping()
    driver = drivers.find(client)
    assert driver is not None
    assert driver.describe(client) == f"pages at 127.0.0.1:{port}"


async def test_a_client_of_postgresql_that_is_a_program_has_the_tests_rows(postgres: Server) -> None:
    registry = Registry("exports")
    psql = embedded._find_postgres().with_name("psql")  # pyright: ignore[reportPrivateUsage]
    if not psql.exists():
        pytest.skip(f"{psql} is not there")

    @registry.resource
    def exports() -> exporter.Exporter:
        return exporter.Exporter(postgres.url, str(psql))

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                connection = await asyncpg.connect(postgres.url)
                await connection.execute("CREATE TABLE exported AS SELECT 1 AS n, 'a' AS name")
                assert await lifespan[exports].csv("exported") == "1,a\n"
                await connection.close()
            with pytest.raises(RuntimeError):
                await lifespan[exports].csv("exported")


async def test_a_declaration_alone_opens_and_closes_the_same_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pages.serving() as (kept, port):
        monkeypatch.setenv("PAGES_PORT", str(port))
        monkeypatch.setattr("lifekit._core.drivers._registered", {})
        async with pages_declared.registry.lifespan() as lifespan:
            client = lifespan[pages_declared.pages]
            await client.put("home", "welcome")
        assert kept == {"main/home": "welcome"}
        with pytest.raises(ConnectionError):
            await client.ping()


# -- servers -----------------------------------------------------------------------------------


def test_an_application_that_serves_itself_says_what_opens_and_closes() -> None:
    with _started("how_to.serve") as server:
        output = _read_until(server, "unning on http")
        port = int(re.findall(r":(\d+) \(Press", output)[0])
        with closing(HTTPConnection("127.0.0.1", port, timeout=100)) as connection:
            connection.request("GET", "/")
            assert connection.getresponse().read() == b'"hello"'
        server.terminate()
        output += server.communicate()[0]
    assert "lifekit:greeting opened in" in output
    assert "lifekit:greeting closed in" in output
    assert server.returncode == -signal.SIGTERM


@pytest.fixture
def failing_uvicorn() -> Iterator[subprocess.Popen[str]]:
    """It starts two workers, which fail, while the test does something else."""
    options = ["--port", "0", "--workers", "2", "--timeout-worker-healthcheck", "1"]
    environment = {"DATABASE_URL": "", "REDIS_URL": "nonsense"}
    with _started("uvicorn", *options, "how_to.adopt_after:app", **environment) as server:
        yield server


@pytest.mark.long
def test_several_workers_have_the_flaws_that_the_page_names(
    failing_uvicorn: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Where this fails, the page's warning or its table of statuses has to change."""
    options = ["-b", "127.0.0.1:0", "--workers", "2", "how_to.uneven:app"]
    with _started("hypercorn", *options, PLACE=str(tmp_path)) as parent:
        _read_until(parent, "Running on", times=2)
        parent.terminate()
        parent.communicate()
        assert parent.returncode == 0
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "slow").exists()  # its lifespan was not closed

    output = failing_uvicorn.communicate()[0]
    assert "failed to start, stopping the parent process" in output
    assert failing_uvicorn.returncode == 0


@pytest.mark.long
def test_a_stop_takes_as_long_as_its_limits_together(environment: dict[str, str]) -> None:
    began = 0.0
    options = ["--port", "0", "--timeout-graceful-shutdown", "1", "how_to.stuck:app"]
    with _started("uvicorn", *options) as server:
        output = _read_until(server, "unning on http")
        port = int(re.findall(r":(\d+) \(Press", output)[0])
        with closing(HTTPConnection("127.0.0.1", port, timeout=100)) as connection:
            connection.request("GET", "/")
            _read_until(server, "asked")
            began = time.monotonic()
            server.terminate()
            output = server.communicate()[0]
    assert 2 <= time.monotonic() - began < 2 + 30
    shown = re.findall(r"^report \(.*\n.*\n.*", _page("kubernetes-deadlines"), re.MULTILINE)
    assert len(shown) == 1
    plain = re.sub(r"^[ |]+", "", output, flags=re.MULTILINE).replace("how_to/", "")
    plain = re.sub(r"longer than 0\.9\d* s", "longer than 1 s", plain)  # of a busy machine
    assert re.sub(r"\n +", "\n", shown[0]) in plain


def test_the_numbers_on_the_page_fit() -> None:
    page = _page("kubernetes-deadlines")
    before, graceful, whole = (
        int(re.findall(pattern, page)[0])
        for pattern in (
            r"sleep: \{seconds: (\d+)\}",
            r"--timeout-graceful-shutdown=(\d+)",
            r"terminationGracePeriodSeconds: (\d+)",
        )
    )
    registry: Registry = _namespace("kubernetes-deadlines")["registry"]
    assert before + graceful + registry.grace + 5 <= whole
    assert registry.close_timeout < registry.grace


def test_the_defaults_on_the_page_are_those_of_the_registry() -> None:
    page = _page("kubernetes-deadlines")
    assert f"| `grace` | `Registry(…)` | {Registry().grace:g} |" in page
    assert f"| `close_timeout` | `Registry(…)`, a resource | {Registry().close_timeout:g} |" in page


# -- asgi-lifespan -----------------------------------------------------------------------------


async def test_only_lifekit_shuts_an_application_down_whose_test_fails() -> None:
    ends: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        try:
            yield
            ends.append("told")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    app = FastAPI(lifespan=lifespan)
    for manager in (LifespanManager(app), testing.client(app)):
        with pytest.raises(ZeroDivisionError):
            async with manager:
                raise ZeroDivisionError
    assert ends == ["cancelled", "told"]


async def test_only_lifekit_hears_of_a_failed_stop_that_is_not_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "no"})

    with pytest.raises(ShutdownError):
        async with testing.client(app):
            pass
    with pytest.raises(TimeoutError):
        async with LifespanManager(app, shutdown_timeout=0.1):
            pass


# -- who-holds-the-connections ---------------------------------------------------------------------


def test_a_route_says_who_holds_the_connections(servers: None) -> None:
    """Nobody, or the line that took one."""
    page = _namespace("who-holds-the-connections")
    app: FastAPI = page["app"]

    @app.get("/report")
    async def report_amid_a_use() -> str:
        async with page["db"].get().acquire():
            return page["report"](app.state.lifespan)  # type: ignore[no-any-return]

    with TestClient(app) as client:
        assert client.get("/holders").text == "nobody"
        assert "test_how_to.py" in client.get("/report").text


# -- threads-and-injectors -------------------------------------------------------------------------


async def test_the_thread_on_the_page_gets_the_value() -> None:
    assert await _namespace("threads-and-injectors")["main"]() == 3
