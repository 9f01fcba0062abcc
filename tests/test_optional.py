"""What is not required: the start goes on without it, it comes when it opens, and who asks is told."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse

import lifekit
from lifekit import (
    DeclarationError,
    OverrideError,
    Registry,
    StartupError,
    UnavailableError,
    events,
    testing,
)

from .virtual_time import in_time

URL = "redis://:hunter2@cache/0"
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Shop:
    """A database, an optional cache that opens when it is up, and what is built from both."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[str] = []
        self.up = False
        self.attempts: list[float] = []
        self.events: list[events.Event] = []
        self.registry = registry = Registry("shop", on_event=self.events.append, **options)

        @registry.resource
        async def db() -> AsyncGenerator[str]:
            yield "db"
            self.lines.append("db closes")

        @registry.resource(required=False)
        async def cache() -> AsyncGenerator[str]:
            self.attempts.append(anyio.current_time())
            await checkpoint()
            if not self.up:
                raise ConnectionError(f"{URL} is away")
            yield "cache"
            self.lines.append("cache closes")

        @registry.resource(db, cache, required=False)
        async def search(db: str, cache: str) -> AsyncGenerator[str]:
            yield f"search in {db} and {cache}"
            self.lines.append("search closes")

        self.db, self.cache, self.search = db, cache, search


@backends
def test_the_start_goes_on_without_it_and_it_appears_when_it_opens(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            assert lifespan[shop.db] == "db"
            for handle in (shop.cache, shop.search):
                with pytest.raises(UnavailableError):
                    lifespan[handle]
                with pytest.raises(UnavailableError):
                    handle.get()
            assert {*lifespan} & {"db", "cache", "search"} == {"db"}
            assert "cache" not in lifespan
            shop.up = True
            await anyio.sleep(0.1)
            assert lifespan[shop.search] == "search in db and cache"
            assert {*lifespan} >= {"db", "cache", "search"}
            assert shop.lines == []

    in_time(main, backend)
    assert shop.lines[0] == "search closes"
    assert {*shop.lines[1:]} == {"cache closes", "db closes"}


@backends
def test_what_waited_for_it_is_unavailable_while_it_opens(backend: str) -> None:
    shop = Shop()

    @shop.registry.resource(shop.cache, required=False)
    async def slow(cache: str) -> str:
        await anyio.sleep(20)
        return f"slow with {cache}"

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            shop.up = True
            await anyio.sleep(10)
            assert lifespan[shop.cache] == "cache"
            with pytest.raises(UnavailableError, match="being tried again just now") as caught:
                lifespan[slow]
            assert isinstance(caught.value.error, ConnectionError)
            await anyio.sleep(15)
            assert lifespan[slow] == "slow with cache"

    in_time(main, backend)


@backends
def test_it_is_tried_again_later_and_later(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan():
            await anyio.sleep(200)

    in_time(main, backend)
    waits = [event.delay for event in shop.events if isinstance(event, events.Unavailable)]
    for number, wait in enumerate(waits):
        most = min(0.1 * 2**number, 30.0)
        assert most / 2 <= wait <= most
    gaps = [after - before for before, after in zip(shop.attempts, shop.attempts[1:], strict=False)]
    assert gaps == pytest.approx(waits[: len(gaps)])
    assert sum(isinstance(event, events.OpenFailed) for event in shop.events) == 0
    assert "cache is unavailable, and tried again in" in caplog.text
    assert "hunter2" not in caplog.text


@backends
def test_the_error_says_why_when_it_is_tried_again_and_what_to_do(backend: str) -> None:
    shop = Shop()
    raised: list[UnavailableError] = []

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            for handle in (shop.cache, shop.search):
                with pytest.raises(UnavailableError) as caught:
                    lifespan[handle]
                raised.append(caught.value)

    in_time(main, backend)
    of_cache, of_search = raised
    assert (of_cache.resource, of_search.resource) == ("cache", "search")
    assert 0 < of_cache.retry_after <= 0.1
    assert isinstance(of_cache.error, ConnectionError)
    text = str(of_search)
    assert text.startswith(f"search ({shop.search.location}) is unavailable: cache (")
    assert "which it needs, did not open, and is tried again in 0." in text
    assert "ConnectionError: redis://:***@cache/0 is away" in text
    again = pickle.loads(pickle.dumps(of_cache))
    assert type(again) is UnavailableError
    assert (again.resource, str(again)) == ("cache", str(of_cache))


@backends
def test_a_worker_that_needs_it_begins_when_it_is_there(backend: str) -> None:
    shop = Shop()
    seen: list[str] = []

    @shop.registry.worker(shop.search)
    async def index(search: str) -> None:
        seen.append(search)
        await anyio.sleep_forever()

    @shop.registry.worker(shop.db)
    async def outbox(db: str) -> None:
        seen.append(db)

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await anyio.sleep(10)
            assert seen == ["db"]
            assert lifespan[index].state == "starting"
            assert (await lifespan.health()).resources["index"].state == "unavailable"
            shop.up = True
            await anyio.sleep(30)
            assert seen == ["db", "search in db and cache"]
            assert lifespan[index].state == "running"

    in_time(main, backend)
    assert shop.lines[0] == "search closes"


@backends
def test_health_names_it_and_stays_ready(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            health = await lifespan.health()
            assert health.ready
            states = {name: each.state for name, each in health.resources.items()}
            assert states == {"db": "ok", "cache": "unavailable", "search": "unavailable"}
            assert "redis://:***@cache/0 is away" in health.resources["cache"].message
            shop.up = True
            await anyio.sleep(5)
            assert (await lifespan.health()).resources["search"].state == "ok"

    in_time(main, backend)


@backends
def test_a_check_of_it_that_fails_does_not_take_the_application_out_of_service(backend: str) -> None:
    registry = Registry()
    fails: list[bool] = []
    registry.resource(required=False, name="cache", check=lambda _: not fails)(object)

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            fails.append(True)
            health = await lifespan.health()
            assert health.ready
            assert health.resources["cache"].state == "failing"

    in_time(main, backend)


@backends
@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_comes_amid_an_attempt_or_between_two(backend: str, hangs: bool) -> None:
    registry = Registry(start_timeout=20.0)
    attempts: list[str] = []

    @registry.resource(required=False)
    async def cache() -> str:
        attempts.append("begins")
        if hangs and len(attempts) > 1:
            try:
                await anyio.sleep_forever()
            finally:
                attempts.append("cut off")
        raise ConnectionError("away")

    async def main() -> None:
        async with registry.lifespan():
            await anyio.sleep(0.12)

    in_time(main, backend)
    assert attempts == (["begins", "begins", "cut off"] if hangs else attempts)


@backends
def test_what_a_failed_attempt_left_open_is_closed_each_time(backend: str) -> None:
    registry = Registry()
    opened: list[str] = []
    closed: list[str] = []

    class Client:
        async def aclose(self) -> None:
            closed.append("closed")

    @registry.resource(required=False, check=lambda client: len(opened) > 3)
    async def cache() -> Client:
        opened.append("opened")
        return Client()

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            await anyio.sleep(3)
            assert (len(opened), len(closed)) == (4, 3)
            assert isinstance(lifespan[cache], Client)

    in_time(main, backend)
    assert len(closed) == 4


@backends
def test_an_attempt_that_hangs_has_its_time_and_the_start_goes_on_then(backend: str) -> None:
    registry = Registry()
    began: list[float] = []

    @registry.resource(required=False, start_timeout=3.0)
    async def cache() -> str:
        await anyio.sleep_forever()
        return "never"

    async def main() -> None:
        before = anyio.current_time()
        async with registry.lifespan():
            began.append(anyio.current_time() - before)
            with pytest.raises(UnavailableError, match="open took longer than 3 s"):
                cache.get()

    in_time(main, backend)
    assert began == [pytest.approx(3.0)]


@backends
def test_a_required_one_that_fails_fails_the_start_as_ever(backend: str) -> None:
    shop = Shop()

    @shop.registry.resource
    async def mail() -> str:
        await anyio.sleep(1)
        raise ValueError("no mail")

    async def main() -> None:
        with pytest.raises(StartupError) as caught:
            async with shop.registry.lifespan():
                pass
        assert [name for name, _ in caught.value.failures] == ["mail"]

    in_time(main, backend)
    assert shop.lines == ["db closes"]


def test_a_required_resource_can_not_need_it() -> None:
    shop = Shop()

    @shop.registry.resource(shop.cache)
    def sessions(cache: str) -> str:
        return cache

    with pytest.raises(DeclarationError, match=r"sessions \(.*\) is required, and needs cache \("):
        shop.registry.lifespan()
    with pytest.raises(DeclarationError, match="required='no'"):
        shop.registry.resource(name="mail", required="no")(object)  # type: ignore[call-overload]


@backends
def test_an_override_of_it_serves_and_leaves_it_alone(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        with shop.registry.override(shop.cache, "fake"):
            async with shop.registry.lifespan() as lifespan:
                assert lifespan[shop.search] == "search in db and fake"
        assert shop.attempts == []
        async with shop.registry.lifespan() as lifespan:
            async with lifespan.override(shop.cache, "fake"):
                assert shop.search.get() == "search in db and fake"
                shop.up = True
                await anyio.sleep(100)  # nothing comes in the midst of it
                assert shop.cache.get() == "fake"
                assert len(shop.attempts) == 1
            with pytest.raises(UnavailableError):
                shop.search.get()
            await anyio.sleep(100)
            assert shop.search.get() == "search in db and cache"

    in_time(main, backend)


@backends
def test_an_override_of_another_one_goes_without_it(backend: str) -> None:
    shop = Shop()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            async with lifespan.override(shop.db, "other"):
                assert shop.db.get() == "other"
                for handle in (shop.cache, shop.search):
                    with pytest.raises(UnavailableError):
                        handle.get()
            shop.up = True
            await anyio.sleep(1)
            assert shop.search.get() == "search in db and cache"

    in_time(main, backend)


@pytest.mark.anyio
@on_asyncio
async def test_an_override_by_what_does_not_open_is_what_requests_miss() -> None:
    shop = Shop()
    shop.up = True
    app = FastAPI(lifespan=shop.registry.lifespan)

    @app.get("/")
    def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.search)

    @app.get("/db")
    def db(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.db)

    async def away() -> str:
        raise ConnectionError("away")

    async with testing.client(app) as client:
        lifespan = shop.registry.running[asyncio.get_running_loop()][-1]
        async with lifespan.override(shop.cache, factory=away):
            assert (await client.get("/db")).text == "db"
            assert (await client.get("/")).status_code == 503
        assert (await client.get("/")).text == "search in db and cache"


@backends
def test_a_worker_goes_on_waiting_for_it_when_what_else_it_needs_was_closed_for_an_override(
    backend: str,
) -> None:
    shop = Shop()

    @shop.registry.resource(shop.db)
    async def feed(db: str) -> AsyncGenerator[str]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)  # by which it goes on working, and has to rest
            yield f"feed of {db}"
            tasks.cancel_scope.cancel()
        shop.lines.append(f"feed of {db} closes")

    @shop.registry.worker(feed, shop.cache)
    async def outbox(feed: str, cache: str) -> None:
        shop.lines.append(f"outbox with {feed} and {cache}")
        await anyio.sleep_forever()

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan:
            await anyio.sleep(1)
            async with lifespan.override(shop.db, "fake"):
                await anyio.sleep(1)
            assert shop.lines == ["feed of db closes", "feed of fake closes"]
            await anyio.sleep(1)
            assert lifespan[outbox].state == "starting"
            shop.up = True
            await anyio.sleep(60)
            assert lifespan[outbox].state == "running"
            assert shop.lines[2:] == ["outbox with feed of db and cache"]

    in_time(main, backend)


@backends
def test_what_opens_while_an_override_begins_comes_after_it(backend: str) -> None:
    shop = Shop()
    slow = anyio.Event

    async def main() -> None:
        opening, goes_on = slow(), slow()

        @shop.registry.resource(required=False)
        async def mail() -> AsyncGenerator[str]:
            if shop.up:
                opening.set()
                await goes_on.wait()
                yield "mail"
                shop.lines.append("mail closes")
            else:
                raise ConnectionError

        async with shop.registry.lifespan() as lifespan:
            shop.up = True
            await opening.wait()
            async with lifespan.override(shop.db, "other"):
                goes_on.set()
                await anyio.sleep(50)
                assert "mail closes" in shop.lines
                with pytest.raises(UnavailableError, match="it opened while the override made at"):
                    lifespan[mail]
            await anyio.sleep(100)
            assert lifespan[mail] == "mail"

    in_time(main, backend)


@pytest.mark.anyio
@on_asyncio
async def test_nothing_appears_within_a_block_and_it_does_after(anyio_backend: object) -> None:
    shop = Shop()
    with testing.sandboxing():
        async with shop.registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                shop.up = True
                before = len(shop.attempts)
                await anyio.sleep(0.5)
                assert len(shop.attempts) <= before + 1
                with pytest.raises(UnavailableError):
                    lifespan[shop.cache]
            with anyio.fail_after(60):
                while "cache" not in lifespan:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            async with lifespan.sandbox():
                assert lifespan[shop.search] == "search in db and cache"


def application(shop: Shop) -> FastAPI:
    app = FastAPI(lifespan=shop.registry.lifespan)

    @app.get("/depends")
    async def depends(search: str = Depends(shop.search)) -> str:
        return search

    @app.get("/get")
    async def get() -> str:
        return shop.search.get()

    @app.get("/sync")
    def sync() -> str:
        return shop.search.get()

    @app.get("/state")
    async def state(request: Request) -> str:
        found: str = request.state.search
        return found

    return app


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize("path", ["/depends", "/get", "/sync", "/state"])
async def test_a_request_that_needs_it_is_answered_with_503(anyio_backend: object, path: str) -> None:
    shop = Shop()
    async with testing.client(application(shop)) as client:
        answer = await client.get(path)
        assert (answer.status_code, answer.json()) == (503, {"detail": "search is unavailable"})
        assert int(answer.headers["Retry-After"]) >= 1
        shop.up = True
        with anyio.fail_after(60):
            while (answer := await client.get(path)).status_code == 503:
                await checkpoint()
        assert answer.json() == "search in db and cache"


@pytest.mark.anyio
@on_asyncio
async def test_an_application_handles_it_itself_if_it_wants_to(anyio_backend: object) -> None:
    shop = Shop()
    app = application(shop)

    @app.exception_handler(UnavailableError)
    async def without(request: Request, error: UnavailableError) -> PlainTextResponse:
        return PlainTextResponse(f"without {error.resource}", status_code=203)

    @app.get("/catches")
    async def catches() -> str:
        try:
            return shop.cache.get()
        except UnavailableError as error:
            return type(error).__name__

    async with testing.client(app) as client:
        answer: httpx.Response = await client.get("/get")
        assert (answer.status_code, answer.text) == (203, "without search")
        assert (await client.get("/catches")).json() == "UnavailableError"


def test_outside_of_a_lifespan_it_is_not_open_as_ever() -> None:
    shop = Shop()
    with pytest.raises(lifekit.NotOpenError):
        shop.cache.get()


@backends
def test_a_stand_in_can_need_it_no_more_than_what_it_stands_in_for(backend: str) -> None:
    shop = Shop()
    with pytest.raises(OverrideError, match="is required, and needs cache"):
        shop.registry.override(shop.db, shop.cache)


@backends
def test_a_slow_end_of_an_attempt_is_no_delay_of_anything_else(backend: str) -> None:
    """The time of the next attempt has passed by then; nothing has blocked the loop."""
    begun: list[float] = []
    registry = Registry("shop", close_timeout=100.0)

    @registry.resource(renew_every=30.0)
    async def db() -> AsyncGenerator[str]:
        begun.append(anyio.current_time())
        yield "db"

    async def fails_at_first(value: str) -> None:
        if len(begun) == 1:
            raise ConnectionError(f"{value} is away")

    @registry.resource(required=False, check=fails_at_first)
    async def cache() -> AsyncGenerator[str]:
        yield "cache"
        await anyio.sleep(20)

    async def main() -> None:
        async with registry.lifespan():
            await anyio.sleep(61)
            first, *later = begun
            assert [at - first for at in later] == pytest.approx([30.0, 60.0])

    in_time(main, backend)
