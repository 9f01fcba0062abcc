"""What README and docs say is so: their code, their messages, the names they list."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
import textwrap
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest
from shortener.resources import registry as shortener

import lifekit
from lifekit import LifekitError, Registry, asgi, embedded, events, testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SOURCES = {
    path.name: path.read_text("utf-8")
    for path in (
        *(DOCS / "examples" / "shortener").glob("*.py"),
        *(DOCS / "examples" / "tests").glob("*.py"),
        ROOT / "tests/test_example.py",
    )
}
BLOCK = re.compile(r"^```(?P<language>\w+)(?P<header>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
QUOTED = re.compile(r'title="([\w.]+)"|^# (\w+\.py)')


def _blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    for block in BLOCK.finditer(page.read_text("utf-8")):
        if block["language"] == language:
            yield block["header"], block["text"]


def _chunks(text: str) -> list[str]:
    return [chunk.strip("\n") for chunk in re.split(r"\n{2,}", textwrap.dedent(text))]


# -- code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_is_a_tested_file_or_runs(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": page.stem}
    for header, text in _blocks(page, "python"):
        if text.startswith("--8<--"):
            continue  # a whole file: mkdocs checks that it is there
        if (quoted := QUOTED.search(header) or QUOTED.match(text)) is None:
            exec(compile(text, page.name, "exec"), namespace)
            continue
        source = SOURCES[quoted[1] or quoted[2]]
        position = 0
        for chunk in _chunks(re.sub(r"\A# .*\n", "", text)):
            found = [source.find(each, position) for each in (chunk, textwrap.indent(chunk, "    "))]
            position = max(found)
            assert position >= 0, f"not in {quoted[0]}, or not in this order:\n{chunk}"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "tutorial.md"], ids=lambda p: p.name)
def test_each_picture_on_a_page_shows_the_whole_example(page: Path) -> None:
    text = page.read_text("utf-8")
    pictures = re.findall(r"^(?:start|stop) of .*\n((?:  \w+ +│.*\n)+)", text, re.MULTILINE)
    assert pictures != []
    names = sorted(name for name in shortener.lifespan() if name.isidentifier())
    for picture in pictures:
        assert sorted(re.findall(r"^  (\w+)", picture, re.MULTILINE)) == names


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


# -- messages ----------------------------------------------------------------------------------


def _declared(*factories: Callable[..., object], **options: Any) -> Registry:
    registry = Registry("shop", **options)
    for factory in factories:
        registry.resource(factory)
    return registry


def _twice_the_same_name() -> None:
    _declared(pool, pool)


def _no_handle() -> None:
    Registry().resource("no handle", 1)  # type: ignore[call-overload] # pyright: ignore


def _no_factory() -> None:
    Registry().resource(1)  # type: ignore[call-overload] # pyright: ignore


def _no_such_option() -> None:
    Registry().resource(retries=3)  # type: ignore[call-overload] # pyright: ignore


def _after_one_handle() -> None:
    Registry().resource(after=_handle())  # type: ignore[call-overload] # pyright: ignore


def _no_name() -> None:
    Registry().resource(lambda: 1)


def _needs_that_do_not_fit() -> None:
    registry = Registry()
    registry.resource(registry.resource(pool))(two)  # type: ignore[arg-type] # pyright: ignore


def _foreign_handle() -> None:
    registry = Registry()
    registry.resource(_handle())(one)
    registry.lifespan()


def _includes_in_a_cycle() -> None:
    registry, other = Registry(), Registry()
    registry.include(other)
    other.include(registry)


def _not_open() -> None:
    _handle().get()


def _not_entered() -> None:
    registry = _declared(pool)
    registry.lifespan()["pool"]


async def _wrong_loop() -> None:
    registry = Registry()
    handle = registry.resource(pool)

    async def elsewhere() -> None:
        handle.get()

    async with registry.lifespan():
        await asyncio.to_thread(asyncio.run, elsewhere())


async def _closes_with_arguments() -> None:
    class Odd:
        def close(self, how: str) -> None: ...

    async with _declared(Odd).lifespan():
        pass


async def _yields_twice() -> None:
    def twice() -> Iterator[int]:
        yield 1
        yield 2

    async with _declared(twice).lifespan():
        pass


async def _combined_twice() -> None:
    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[dict[str, int]]:
        yield {"db": 1}

    async with asgi.combine(lifespan, lifespan)(None):
        pass


async def _fails_to_start() -> None:
    registry = Registry("shop")
    first = registry.resource(pool)
    second = registry.resource(first)(refused)
    registry.resource(second)(one)
    async with registry.lifespan():
        pass


async def _fails_to_stop() -> None:
    def stubborn() -> Iterator[int]:
        yield 1
        raise OSError("no")

    async with _declared(stubborn).lifespan():
        pass


async def _takes_too_long() -> None:
    async with _declared(asyncio.Event().wait, start_timeout=0.01).lifespan():
        pass


async def _ignores_its_cancellation() -> None:
    released = asyncio.Event()

    async def stubborn() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    try:
        async with _declared(stubborn, start_timeout=0.01, close_timeout=0.01).lifespan():
            pass
    finally:
        released.set()


async def _runs_twice() -> None:
    lifespan = _declared(pool).lifespan()
    async with lifespan:
        pass
    async with lifespan:
        pass


async def _checks_in_vain() -> None:
    registry = Registry()
    registry.resource(check=lambda _: False)(pool)
    async with registry.lifespan():
        pass


async def _overrides_too_late() -> None:
    registry = Registry()
    handle = registry.resource(pool)
    override = registry.override(handle, 2)
    async with registry.lifespan():
        override.__enter__()


def _overrides_with_another_type() -> None:
    registry = Registry()
    registry.override(registry.resource(pool), "2")  # pyright: ignore


def _overrides_elsewhere() -> None:
    Registry().override(_handle(), 2)


async def _sandboxes_what_was_not_prepared() -> None:
    async with _declared(pool).lifespan() as lifespan, lifespan.sandbox():
        pass


async def _leaves_a_task_behind() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox():
        await db.acquire()


async def _works_after_its_test() -> None:
    go = asyncio.Event()

    async def late(db: Any) -> None:
        await go.wait()
        await db.execute("SELECT 1")

    async with _sandboxed() as (db, lifespan):
        async with lifespan.sandbox():
            task = asyncio.create_task(late(db))
            await asyncio.sleep(0)
        go.set()
        await task


async def _goes_round_the_sandbox() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox(), db.acquire() as connection:
        await connection.execute("SELECT 1")
        await connection._con._protocol.real.query("COMMIT", 1)
        await connection.execute("SELECT 1")


async def _asks_for_a_second_connection() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox(), db.acquire() as connection:
        await connection.execute("BEGIN; CREATE TABLE a ()")
        await db.execute("SELECT 1")


async def _wants_one_more_than_there_are() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox():
        for _ in range(3):
            await db.acquire()


async def _listens() -> None:
    async with _sandboxed() as (db, lifespan), lifespan.sandbox():
        await db.execute("LISTEN news")


@asynccontextmanager
async def _sandboxed() -> AsyncGenerator[tuple[Any, lifekit.Lifespan]]:
    registry = Registry()

    @registry.resource
    def db() -> asyncpg.Pool:
        return asyncpg.create_pool(os.environ["TEST_DOCS_URL"], min_size=0, max_size=2)

    with testing.sandboxing():
        async with registry.lifespan() as lifespan:
            yield lifespan[db], lifespan


@pytest.fixture(autouse=True)
def _database(postgres: embedded.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DOCS_URL", postgres.url)


def pool() -> int:
    return 1


def one(_: int) -> int:
    return 1


def two(_: int, __: int) -> int:
    return 1


def refused(_: int) -> int:
    raise ConnectionRefusedError


def _handle() -> lifekit.Resource[int]:
    return Registry("shop").resource(pool)


MISTAKES: list[Callable[[], Any]] = [
    _twice_the_same_name,
    _no_handle,
    _no_factory,
    _no_such_option,
    _after_one_handle,
    _no_name,
    _needs_that_do_not_fit,
    _foreign_handle,
    _includes_in_a_cycle,
    _closes_with_arguments,
    _yields_twice,
    _combined_twice,
    _not_open,
    _not_entered,
    _wrong_loop,
    _fails_to_start,
    _fails_to_stop,
    _takes_too_long,
    _ignores_its_cancellation,
    _overrides_too_late,
    _overrides_with_another_type,
    _overrides_elsewhere,
    _sandboxes_what_was_not_prepared,
    _leaves_a_task_behind,
    _works_after_its_test,
    _goes_round_the_sandbox,
    _asks_for_a_second_connection,
    _wants_one_more_than_there_are,
    _listens,
    _runs_twice,
    _checks_in_vain,
]
MESSAGES = [text.strip() for _, text in _blocks(DOCS / "errors.md", "text")]


def _texts(error: BaseException) -> Iterator[str]:
    yield str(error)
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _texts(each)  # pyright: ignore[reportUnknownArgumentType]


def test_each_mistake_has_its_own_message_on_the_page() -> None:
    assert len(MESSAGES) == len(MISTAKES)


@pytest.mark.parametrize(
    ("message", "mistake"),
    list(zip(MESSAGES, MISTAKES, strict=False)),
    ids=lambda each: each.__name__.strip("_") if callable(each) else "",
)
def test_a_message_on_the_page_is_what_the_mistake_raises(
    message: str, mistake: Callable[[], Any]
) -> None:
    with pytest.raises(LifekitError) as caught:
        if inspect.iscoroutinefunction(mistake):
            asyncio.run(mistake())
        else:
            mistake()

    pattern = re.compile(re.escape(message).replace("…", ".*?"), re.DOTALL)
    texts = list(_texts(caught.value))
    assert any(map(pattern.match, texts)), "\n".join(texts)


# -- names -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return site


def test_every_public_name_has_its_place_in_the_reference(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    public = {f"lifekit.{name}" for name in lifekit.__all__}
    public |= {f"lifekit.events.{event.__name__}" for event in get_args(events.Event)}
    public |= {"lifekit.events.Event", "lifekit.asgi.combine", "lifekit.drivers.register"}
    public |= {"lifekit.embedded.postgres", "lifekit.embedded.valkey", "lifekit.drivers.Sandbox"}
    public |= {f"lifekit.testing.{name}" for name in testing.__all__}
    assert public <= listed, sorted(public - listed)


def test_every_error_has_its_place_in_the_index() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
    errors = [name for name in lifekit.__all__ if name.endswith("Error")]
    assert [name for name in errors if f"`{name}`" not in text and f"## {name}\n" not in text] == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:link|script|img)\b[^>]*(?:href|src)="https?://[^"]*"')
    assert [found for page in site.rglob("*.html") for found in loads.findall(page.read_text())] == []


# -- the repository ----------------------------------------------------------------------------

HOME = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")


def test_no_file_names_a_directory_of_the_machine_it_was_written_on() -> None:
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("git does not know this directory")
    paths = [ROOT / name for name in listed.stdout.split("\0")]
    texts = {each: each.read_text("utf-8", errors="replace") for each in paths if each.is_file()}
    assert ROOT / "README.md" in texts
    named = [path.name for path, text in texts.items() if HOME.search(text) or str(ROOT) in text]
    assert named == []
