# pyright: reportUnknownMemberType=false
"""The URL shortener of docs/examples, on a real PostgreSQL and a real Valkey."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
from redis import Redis
from shortener import resources
from shortener.links import Links
from shortener.main import app
from starlette.testclient import TestClient

from lifekit.embedded import Server

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PAGE = "https://example.org/"

Database = psycopg2.extensions.cursor


@contextmanager
def _database(url: str) -> Generator[Database]:
    connection = psycopg2.connect(url, application_name="the test itself")
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


@pytest.fixture
def database_url(postgres: Server) -> Iterator[str]:
    with _database(postgres.url) as server:
        server.execute("CREATE DATABASE shortener")
        yield urlsplit(postgres.url)._replace(path="/shortener").geturl()
        server.execute("DROP DATABASE shortener")  # which fails while anyone is connected


@pytest.fixture
def redis_url(valkey: Server) -> Iterator[str]:
    url = urlsplit(valkey.url)._replace(path="/9").geturl()
    yield url
    with Redis.from_url(url) as redis:
        redis.flushdb()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with _database(database_url) as cursor:
        yield cursor


@pytest.fixture
def servers(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both servers are named in the environment."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)


@pytest.fixture
def client(request: pytest.FixtureRequest, servers: None) -> TestClient:
    """A client for ``with``, which runs the application's lifespan."""
    options = {"use_uvloop": getattr(request, "param", None) == "uvloop"}
    return TestClient(app, backend_options=options, follow_redirects=False)


on_each_loop = pytest.mark.parametrize("client", ["asyncio", "uvloop"], indirect=True)


def _shorten(client: TestClient, url: str = PAGE) -> str:
    slug = client.post("/links", json={"url": url}).json()["slug"]
    assert isinstance(slug, str)
    return slug


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < until


# -- what it answers ---------------------------------------------------------------------------


def test_a_short_link_leads_to_its_page(client: TestClient) -> None:
    with client:
        made = client.post("/links", json={"url": "https://example.org/"})
        answer = client.get("/" + made.json()["slug"])

    assert made.status_code == 201
    assert (answer.status_code, answer.headers["location"]) == (307, "https://example.org/")


def test_an_unknown_link_is_not_found(client: TestClient) -> None:
    with client:
        assert client.get("/unknown").status_code == 404


def test_only_urls_are_shortened(client: TestClient) -> None:
    with client:
        assert client.post("/links", json={"url": "no url"}).status_code == 422


def test_a_link_outlives_the_application(client: TestClient) -> None:
    with client:
        slug = _shorten(client)
    with client:
        assert client.get(f"/{slug}").headers["location"] == PAGE


def test_a_second_visit_asks_the_cache_alone(client: TestClient, database: Database) -> None:
    with client:
        slug = _shorten(client)
        client.get(f"/{slug}")
        database.execute("DELETE FROM links")
        assert client.get(f"/{slug}").headers["location"] == PAGE


def test_a_link_for_some_days_has_an_end_and_another_has_none(
    client: TestClient, database: Database
) -> None:
    with client:
        client.post("/links", json={"url": PAGE, "days": 2})
        _shorten(client)
        assert client.post("/links", json={"url": PAGE, "days": 0}).status_code == 422

    database.execute("SELECT round(extract(epoch from expires - now()) / 86400) FROM links ORDER BY 1")
    assert database.fetchall() == [(2,), (None,)]


def test_expired_links_are_removed_when_it_starts(client: TestClient, database: Database) -> None:
    with client:
        for days in (1, 3):
            client.post("/links", json={"url": PAGE, "days": days})
        database.execute("UPDATE links SET expires = expires - interval '2 days'")
    with client:
        _until(lambda: len(client.get("/reports/top").json()) == 1)


@on_each_loop
def test_the_report_lists_the_most_visited_first(client: TestClient) -> None:
    with client:
        once, thrice, never = (_shorten(client, f"{PAGE}{number}") for number in range(3))
        for slug in (thrice, once, thrice, thrice):
            client.get(f"/{slug}")
        _until(lambda: sum(each["visits"] for each in client.get("/reports/top").json()) == 4)
        report = client.get("/reports/top").json()

    assert report == [
        {"slug": thrice, "url": f"{PAGE}1", "visits": 3},
        {"slug": once, "url": f"{PAGE}0", "visits": 1},
        {"slug": never, "url": f"{PAGE}2", "visits": 0},
    ]


def test_the_report_lists_ten_links(client: TestClient) -> None:
    with client:
        for _ in range(11):
            _shorten(client)
        assert len(client.get("/reports/top").json()) == 10


def test_it_is_healthy_until_it_has_ended(client: TestClient) -> None:
    with client:
        for path in ("/health/livez", "/health/readyz"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()) == (200, {"ready": True, "live": True})
    assert client.get("/health/readyz").status_code == 503


# -- how else it is used -----------------------------------------------------------------------


class NoLinks:
    """Stands where `Links` does, and knows none."""

    async def follow(self, slug: str) -> None:
        """Return None."""


def test_a_handle_is_overridden_like_any_dependency() -> None:
    app.dependency_overrides[resources.links] = NoLinks
    try:
        assert TestClient(app).get("/anything").status_code == 404
    finally:
        app.dependency_overrides.clear()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_script_uses_the_same_declarations(servers: None, database: Database) -> None:
    async with resources.registry.lifespan() as lifespan:
        unused = await lifespan[resources.links].create(PAGE)
        await lifespan[resources.db].execute("DELETE FROM links WHERE visits = 0")
        assert await lifespan[resources.links].follow(unused) is None


# -- what it leaves ----------------------------------------------------------------------------


@on_each_loop
def test_visits_that_are_not_saved_yet_are_saved_after_the_next_start(
    client: TestClient, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise ConnectionError("PostgreSQL is away")

    with client:
        slug = _shorten(client)
        with monkeypatch.context() as patched:
            patched.setattr(Links, "save", away)
            client.get(f"/{slug}")
            client.get(f"/{slug}")
    with client:
        _until(lambda: client.get("/reports/top").json()[0]["visits"] == 2)
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen("visits") == 0


@on_each_loop
def test_every_connection_is_gone_after_the_stop(
    client: TestClient, database: Database, valkey: Server
) -> None:
    def connections() -> tuple[int, int]:
        database.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = 'shortener' AND pid != pg_backend_pid()"
        )
        [count] = database.fetchone() or [0]
        with Redis.from_url(valkey.url) as redis:
            return count, sum(each["db"] == "9" for each in redis.client_list())

    with client:
        client.get(f"/{_shorten(client)}")
        client.get("/reports/top")
        in_postgres, in_valkey = connections()
        assert in_postgres > 1  # of two pools
        assert in_valkey > 0

    _until(lambda: connections() == (0, 0))  # a server sees the end of a connection a little later


def test_it_starts_no_server_where_the_environment_names_one(client: TestClient) -> None:
    def children() -> set[psutil.Process]:
        return set(psutil.Process().children())

    before = children()
    with client:
        assert children() == before


# -- the demo ----------------------------------------------------------------------------------


def _demo(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "shortener.demo", *arguments],
        cwd=EXAMPLES,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _assert_tells_all(output: str) -> None:
    start, answers, stop = re.split(r"\n\n", output.strip(), maxsplit=2)
    names = ["cache", "db", "links", "postgres", "reports", "schema", "settings", "valkey"]
    for picture in (start, stop):
        assert {*names} <= {*re.findall(r"^  (\w+) +│", picture, re.MULTILINE)}
    assert start.startswith("start of shortener in ")
    assert "stop of shortener in " in stop
    statuses = re.findall(r"^(?:GET |POST) /\S* +(\d+)\b", answers, re.MULTILINE)
    assert statuses == ["201", "201", "307", "307", "307", "404", "200", "200"]
    assert "save_visits failed, and is run again in 0." in answers
    assert re.search(r'^  data: .*"visits": 2.*"visits": 1.*', answers, re.MULTILINE)


def test_the_demo_prints_its_answers_and_both_timelines(database_url: str, redis_url: str) -> None:
    with _demo(DATABASE_URL=database_url, REDIS_URL=redis_url) as demo:
        output, _ = demo.communicate()

    assert demo.returncode == 0, output
    _assert_tells_all(output)
    assert "\nSIGTERM, while that goes on: it has ended\n" in output


@pytest.mark.long
def test_a_demo_that_stays_ends_with_ctrl_c_and_leaves_no_process() -> None:
    with _demo("--stay") as demo:
        try:
            assert demo.stdout is not None
            output = ""
            while "until Ctrl-C" not in output:
                line = demo.stdout.readline()
                assert line, output
                output += line
            servers = psutil.Process(demo.pid).children(recursive=True)
            programs = {server.name() for server in psutil.Process(demo.pid).children()}
            demo.send_signal(signal.SIGINT)
            output += demo.communicate()[0]
        finally:
            demo.kill()

    assert demo.returncode == 0, output
    _assert_tells_all(output)
    assert programs == {"postgres", "valkey-server"}
    _, alive = psutil.wait_procs(servers, timeout=100)
    assert alive == []


@pytest.mark.long
def test_a_demo_whose_server_is_not_there_says_so_and_ends(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # free again when the demo asks
    url = f"postgresql://lifekit:sesame@127.0.0.1:{port}/shortener"
    with _demo(DATABASE_URL=url, REDIS_URL=redis_url) as demo:
        output, _ = demo.communicate()

    assert demo.returncode != 0
    assert "shortener did not start: db failed" in output
    assert "ConnectionRefusedError" in output
    assert "sesame" not in output


def test_its_own_tests_pass_and_leave_nothing(
    database_url: str, redis_url: str, database: Database
) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:valkey", "-p", "no:cacheprovider"],
        cwd=EXAMPLES,
        env=os.environ | {"DATABASE_URL": database_url, "REDIS_URL": redis_url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"^\d+ passed in ", ran.stdout, re.MULTILINE)
    database.execute("SELECT count(*) FROM links")
    assert database.fetchone() == (0,)
