"""Each contestant does the same work; what the documentation shows of it is what was saved."""

from __future__ import annotations

import asyncio
import gc
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio as redis

from lifekit import embedded
from lifekit._sandbox.postgres.hub import FIRST_NUMBER

from . import __main__ as command
from . import contests, figures, page, peers, per_test, results, users
from .access import SCOPE, Message, served
from .measure import Row, contest, table
from .peers.work import Plan, Pool


@pytest.fixture(autouse=True)
def heap_of_the_test_run() -> Iterator[None]:
    """Keep the rest of the test run out of the many collections that benchmarks ask for."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def shared_postgres(postgres: embedded.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the test a server of its own: a benchmark makes a database anyway."""
    monkeypatch.setattr(embedded, "postgres", partial(embedded.postgres, postgres.url))


# -- the same work -------------------------------------------------------------------------------


async def answered(app: Any, state: dict[str, Any]) -> bytes:
    """Ask for the only page of an application, and return what it says."""
    said = b""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal said
        assert message.get("status", 200) == 200
        said += message.get("body", b"")

    await app({**SCOPE, "state": state.copy()}, receive, send)
    return said


@pytest.mark.parametrize(("case", "made"), [("one", 0), ("chain", 3)])
@pytest.mark.parametrize("name", peers.CONTESTANTS)
def test_each_answers_the_same_from_one_open_pool(name: str, case: str, made: int) -> None:
    """Three requests share a pool, have objects of their own, and the pool closes at the end."""
    module = peers.load(name)
    assert module is not None
    log: list[Pool] = []

    async def run() -> None:
        app = getattr(module, case)(log)
        async with served(app) as state:
            assert [pool.is_open for pool in log] == [True]
            assert [await answered(app, state) for _ in range(3)] == [b"pool"] * 3
            assert len(log) == 1

    asyncio.run(run())
    assert not log[0].is_open
    assert (log[0].repos, log[0].services) == (made, made)


@pytest.mark.parametrize("seconds", [0.0, 0.001])
@pytest.mark.parametrize("name", [name for name in peers.CONTESTANTS if "plain" not in name])
def test_each_opens_after_its_needs_and_closes_before_them(name: str, seconds: float) -> None:
    """Every resource opens once and closes once; all are open in between."""
    module = peers.load(name)
    assert module is not None
    plan = Plan(12, 3, seconds)

    async def run() -> None:
        async with module.graph(plan):
            assert [event for event, _ in plan.events] == ["open"] * 12

    asyncio.run(run())
    opened = [node for event, node in plan.events if event == "open"]
    closed = [node for event, node in plan.events if event == "close"]
    assert set(opened) == set(closed) == set(plan.nodes)
    assert len(opened) == len(closed) == 12
    for node in plan.nodes:
        for need in node.needs:
            assert opened.index(need) < opened.index(node)
            assert closed.index(node) < closed.index(need)


@pytest.mark.usefixtures("shared_postgres")
def test_ways_to_isolate_leave_no_row_in_postgresql_where_they_claim_it() -> None:
    """The row of a test is there for those that isolate nothing, and for no other."""

    async def run() -> None:
        async with per_test.database() as url:
            for name, way in {
                **per_test.postgres_ways(url),
                **{f"{name} (SQLAlchemy)": way for name, way in per_test.sqlalchemy_ways(url).items()},
            }.items():
                async with way.prepared() as test:
                    await test()
                connection = await asyncpg.connect(url)
                left = await connection.fetchval("DELETE FROM notes RETURNING body")
                await connection.close()
                assert (left is None) == way.isolates, name

    asyncio.run(run())


def test_ways_to_isolate_leave_no_key_in_redis_where_they_claim_it() -> None:
    """The key of a test is there for those that isolate nothing, and for no other."""

    async def run() -> None:
        async with embedded.valkey() as server, AsyncExitStack() as stack:
            admin: Any = await stack.enter_async_context(redis.from_url(server.url))
            for name, way in per_test.redis_ways(server.url).items():
                assert way is not None
                async with way.prepared() as test:
                    await test()
                    left = await admin.info("keyspace")
                await admin.flushall()
                assert (left == {}) == way.isolates, name

    asyncio.run(run())


@pytest.mark.usefixtures("shared_postgres")
def test_ways_to_isolate_an_application_leave_nothing_where_they_claim_it() -> None:
    """Neither the row that a request wrote nor the key is there for the next test."""

    async def run() -> None:
        async with per_test.database() as url, embedded.valkey() as server, AsyncExitStack() as stack:
            admin: Any = await stack.enter_async_context(redis.from_url(server.url))
            for name, way in users.ways(url, server.url).items():
                async with way.prepared() as test:
                    await test()
                    keys = await admin.info("keyspace")
                await admin.flushall()
                connection = await asyncpg.connect(url)
                row = await connection.fetchval("DELETE FROM notes RETURNING body")
                await connection.close()
                assert (row is None, keys == {}) == (way.isolates, way.isolates), name

    asyncio.run(run())


@pytest.mark.usefixtures("shared_postgres")
def test_what_connects_beside_the_sandbox_does_not_go_by_its_gateway() -> None:
    """A way that connects in its tests is measured with the server itself."""
    numbers: list[int] = []

    async def run() -> None:
        async with per_test.database() as url:

            async def test() -> None:
                connection = await asyncpg.connect(url)
                numbers.append(connection.get_server_pid())
                await connection.close()

            @asynccontextmanager
            async def connecting() -> AsyncGenerator[per_test.Test]:
                yield test

            ways = per_test.postgres_ways(url)
            chosen = {name: ways[name] for name in ("nothing", "lifekit's sandbox")}
            chosen["connecting"] = per_test.Way(connecting)
            await per_test.measured_ways("isolation", dict(chosen), 2, 1)

    asyncio.run(run())
    assert len(numbers) == 3
    assert max(numbers) < FIRST_NUMBER


CONTESTS = {
    "isolation": 9,
    "isolation-sqlalchemy": 3,
    "isolation-redis": 4,
    "isolation-aiopg": 3,
    "server": 1,
    "import-peers": 2,
    "graph-idle": 8,
    "graph-slow": 8,
    "request-one": 9,
    "request-chain": 9,
}


@pytest.mark.long
@pytest.mark.usefixtures("shared_postgres")
@pytest.mark.parametrize("name", CONTESTS)
def test_a_contest_has_a_row_for_each_and_no_bar(name: str) -> None:
    """The first is the floor, or there is one; all took some time."""
    rows = command.BENCHMARKS[name].tiny()
    assert len(rows) == CONTESTS[name]
    assert 1.0 in [row.ratio for row in rows]
    for row in rows:
        assert not row.has_bar
        assert row.key
        assert min(row.floor, row.ours, row.ratio) > 0


@pytest.mark.parametrize("name", contests.IMPORTS)
def test_what_is_imported_of_each_is_there(name: str) -> None:
    """The import that is timed works; without the package, nothing is timed."""
    exec(contests.IMPORTS[name], {})
    assert find_spec(peers.CONTESTANTS[name][1]) is not None


def test_nothing_of_lifekit_is_left_out_of_its_import() -> None:
    """A lifespan that runs afterwards, with no driver in it, imports no more of lifekit."""
    program = f"""if True:
        import asyncio, sys
        import fastapi
        {contests.IMPORTS["lifekit"]}
        before = set(sys.modules)
        registry = Registry()
        registry.resource(int)
        async def main():
            async with registry.lifespan():
                print([name for name in set(sys.modules) - before if name.startswith("lifekit")])
        asyncio.run(main())
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr


def test_a_library_that_is_not_installed_has_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are measured; the table on the page says it as well."""

    def found(package: str) -> object:
        return None if package == "dishka" else find_spec(package)

    monkeypatch.setattr(peers, "find_spec", found)
    rows = command.BENCHMARKS["request-one"].tiny()
    missing = [row.what for row in rows if row.missing]
    assert missing == ["request-one: dishka"]
    assert "dishka is not installed" in table(rows)
    by_name = {row.key.partition("/")[2]: row for row in rows}
    assert "| dishka | was not installed |" in figures.as_table(page.FIGURES[0], by_name)
    assert ">dishka<" not in figures.as_svg(page.FIGURES[0], by_name)


# -- what is shown of it -------------------------------------------------------------------------


def test_the_documentation_shows_what_was_saved() -> None:
    """Stale tables or pictures: `python -m tests.benchmarks --draw` writes them anew."""
    stale = [
        str(path)
        for path, text in page.drawn(results.load()).items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    assert stale == []


def test_each_figure_and_each_cell_has_its_place() -> None:
    """No number is drawn for nobody, and no mark is left open."""
    texts = [(page.DOCS / path).read_text("utf-8") for path in page.PAGES]
    marks = [match[2] for text in texts for match in page.CELL.finditer(text)]
    assert {*marks} == {*page.CELLS, *(figure.key for figure in page.FIGURES)}
    assert len(marks) == sum(text.count("<!-- bench:") for text in texts)
    drawn = {page.DOCS / page.picture(figure) for figure in page.FIGURES}
    assert drawn == {*(page.DOCS / "images").glob("bench-*.svg")}


def test_what_is_saved_has_all_figures_and_names_no_place() -> None:
    """Every contestant is in it, measured; neither host nor folder is."""
    saved = results.load()
    for figure in page.FIGURES:
        assert {figure.floor, figure.ours} <= {*saved.figure(figure.key)}
    assert not [row.key for row in saved.rows.values() if row.missing]
    text = results.SAVED.read_text("utf-8")
    assert {*saved.machine} == {"processor", "cores", "system"}
    assert platform.node() not in saved.machine.values()
    assert not re.search(r"/(home|root|work|Users|tmp)/", text)


def test_saving_a_part_keeps_the_rest_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The part is new, the rest as it was, and the page follows both."""
    docs, saved = tmp_path / "docs", tmp_path / "results.json"
    for path in page.PAGES:
        (docs / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page.DOCS / path, docs / path)
    (docs / "images").mkdir()
    before = results.load()
    document = json.loads(results.SAVED.read_text("utf-8"))
    here = {"machine": results.machine(), "versions": results.versions()}
    saved.write_text(json.dumps({**document, **here}), "utf-8")

    arguments = ["graph-idle", "--tiny", "--save", "--results", str(saved), "--docs", str(docs)]
    assert command.main(arguments) == 0

    after = results.load(saved)
    assert {*after.rows} == {*before.rows}
    changed = {key.partition("/")[0] for key, row in after.rows.items() if row != before.rows[key]}
    assert "graph-idle" in changed
    assert "wrote docs/images/bench-graph-idle.svg" in capsys.readouterr().out
    text = page.drawn(after, docs)[docs / "benchmarks.md"]
    assert (docs / "benchmarks.md").read_text("utf-8") == text
    assert command.main(["--draw", "--results", str(saved), "--docs", str(docs)]) == 0
    assert capsys.readouterr().out == ""


def test_parts_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    """One table is one run's: what is there of another machine is refused."""
    row = Row("fast", 1.0, 1.0, 1.0, "ms", key="one/a")
    saved = tmp_path / "results.json"
    results.save([row], saved)
    text = saved.read_text("utf-8").replace('"cores": ', '"cores": 1')
    saved.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="measure all"):
        results.save([replace(row, key="two/a")], saved)
    assert saved.read_text("utf-8") == text


def test_who_is_faster_is_said_from_the_numbers() -> None:
    """Rounds that overlap make no difference; the floor and lifekit itself are not named."""
    costs: dict[str, list[float] | None] = {
        "floor": [1.0] * 5,
        "lifekit": [2.0, 2.1, 2.2, 2.3, 2.4],
        "quick": [1.1] * 5,
        "near": [2.0, 2.3, 2.3, 2.3, 2.5],
        "slow": [9.0] * 5,
        "slower": [9.5] * 5,
        "absent": None,
    }
    rows = {row.key.partition("/")[2]: row for row in contest("x", costs, "ms")}
    figure = figures.Figure("x", "Work", "floor", "each", labels={"quick": "a quick one"})
    said = "Faster than lifekit: a quick one. As fast: near. Slower: slow, slower."
    assert figures.compared(figure, rows) == said
    assert figures.compared(figure, {"lifekit": rows["lifekit"]}) == "Faster than lifekit: none."
    lines = [line.split(" | ")[0] for line in figures.as_table(figure, rows).splitlines()[2:]]
    assert lines == [
        "| *floor* (the floor)",
        "| a quick one",
        "| **lifekit**",
        "| near",
        "| slow",
        "| slower",
        "| absent",
    ]


def test_the_overview_names_the_fastest_and_the_place_of_lifekit() -> None:
    """The floor is not in the race, nor is who is missing."""
    costs: dict[str, list[float] | None] = {
        "floor": [1.0],
        "lifekit": [2.0],
        "quick": [1.5],
        "slow": [9.0],
        "absent": None,
    }
    rows = {row.key.partition("/")[2]: row for row in contest("x", costs, "ms")}
    said = figures.overview({figures.Figure("x", "Work", "floor", "each"): rows})
    assert said.splitlines()[2:] == ["| Work | quick, 1.50 | 2.00 | 2 of 3 |"]


def test_labels_have_room_beside_their_bars() -> None:
    """A bold letter takes 0.6 of the font size, on average."""
    saved = results.load()
    for figure in page.FIGURES:
        for name in saved.figure(figure.key):
            room = figures.LABELS - 8
            assert len(figure.label(name)) * figures.FONT * 0.6 < room, figure.label(name)


def test_bars_are_as_long_as_the_times_and_the_line_is_the_floor() -> None:
    """Twice the time is twice the length, and the floor's bar ends at the line."""
    rows = {row.key[2:]: row for row in contest("x", {"floor": [3.0], "lifekit": [6.0]}, "ms")}
    svg = figures.as_svg(figures.Figure("x", "Work & more", "floor", "each"), rows)
    floor, ours = map(float, re.findall(r' width="([\d.]+)"', svg))
    (line,) = re.findall(r'<path d="M([\d.]+) ', svg)
    assert ours == pytest.approx(2 * floor)
    assert float(line) == pytest.approx(figures.LABELS + floor)
    assert "Work &amp; more" in svg


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("background", figures.BACKGROUNDS)
def test_pictures_can_be_read_on_light_and_on_dark(background: str) -> None:
    """An image does not know the page's scheme, so each colour has to do for both."""
    for colour in (figures.TEXT, figures.OURS, figures.FLOOR, figures.PLAIN):
        lighter, darker = sorted((_luminance(colour), _luminance(background)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= (3.8 if colour == figures.TEXT else 3), colour
