"""Workers: when they run, what follows a failure, how they end, and what they tell. In virtual time."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import lifekit
from lifekit import CrashError, DeclarationError, Registry, ShutdownError, Worker, events
from lifekit._core.worker import Rules, Supervision

from .virtual_time import in_time, run

URL = "postgresql://shop:hunter2@db/shop"
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Story:
    """What happened, in order."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[str] = []
        self.registry = Registry("shop", on_event=self.hear, **options)

        @self.registry.resource
        async def db() -> AsyncGenerator[str]:
            self.lines.append("db opens")
            await anyio.sleep(1)
            yield "db"
            self.lines.append("db closes")

        @self.registry.resource
        async def slow() -> AsyncGenerator[None]:
            await anyio.sleep(5)
            self.lines.append("slow opened")
            yield

        self.db = db

    def hear(self, event: events.Event) -> None:
        match event:
            case events.WorkerStarted():
                self.lines.append(f"{event.resource} begins")
            case events.WorkerEnded():
                self.lines.append(f"{event.resource} {event.state}")
            case events.Crashed():
                self.lines.append(f"{event.resource} crashed")
            case events.WorkerFailed(error=error):
                self.lines.append(f"{event.resource} failed: {error}")
            case _:
                pass


@backends
def test_a_worker_begins_when_all_is_open_and_ends_before_its_needs_close(backend: str) -> None:
    story = Story()

    @story.registry.worker(story.db)
    async def outbox(db: str) -> None:
        try:
            story.lines.append(f"works with {db}")
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)
            story.lines.append("works no more")

    async def main() -> None:
        async with story.registry.lifespan() as lifespan:
            await checkpoint()
            assert lifespan[outbox].state == "running"
        assert lifespan[outbox].state == "ended"

    in_time(main, backend)
    assert isinstance(outbox, Worker)
    assert story.lines == [
        *("db opens", "slow opened", "outbox begins", "works with db"),
        *("works no more", "outbox ended", "db closes"),
    ]


@backends
def test_a_failed_run_is_told_and_run_again_later_and_later(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry("shop")
    runs: list[float] = []

    @registry.worker(limit=(100, 3600.0))
    async def outbox() -> None:
        runs.append(anyio.current_time())
        raise ConnectionError(f"{URL} is away")

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            await anyio.sleep(300)
            status = lifespan[outbox]
            assert status.state == "restarting"
            assert status.restarts == len(runs) - 1
            assert str(status.last_error) == "postgresql://shop:***@db/shop is away"

    in_time(main, backend)
    pauses = [after - before for before, after in pairwise(runs)]
    for number, pause in enumerate(pauses):
        longest = min(0.1 * 2**number, 30.0)
        assert longest / 2 <= pause <= longest + 0.01
    assert len(pauses) > 12
    (first, *_) = caplog.records
    assert first.levelno == logging.ERROR
    assert first.exc_info is not None
    assert re.match(r"outbox failed, and is run again in 0\.\d\d s: ConnectionError: ", first.message)
    assert "hunter2" not in caplog.text


@backends
def test_too_many_failures_are_a_crash_that_cancels_the_body(backend: str) -> None:
    story = Story()

    @story.registry.worker(story.db, limit=(2, 60.0))
    async def outbox(db: str) -> None:
        raise ZeroDivisionError("no luck")

    async def main() -> None:
        lifespan = story.registry.lifespan()
        with pytest.raises(CrashError) as caught:
            async with lifespan:
                await anyio.sleep(1000)
                story.lines.append("the body went on")
        assert lifespan[outbox].state == "crashed"
        assert caught.value.failures == (("outbox", lifespan[outbox].last_error),)
        assert caught.group_contains(ZeroDivisionError, match="no luck")
        assert "outbox (tests/test_workers.py" in str(caught.value)
        await checkpoint()  # nothing of the cancellation is left

    in_time(main, backend)
    assert story.lines[3:] == [
        *["outbox failed: no luck"] * 3,
        *("outbox crashed", "outbox crashed", "db closes"),
    ]


@backends
@pytest.mark.parametrize("on_crash", ["unready", "ignore"])
def test_a_crash_that_is_to_stop_nothing_is_only_told(backend: str, on_crash: Any) -> None:
    story = Story()

    @story.registry.worker(restart="never", on_crash=on_crash)
    async def outbox() -> None:
        raise ZeroDivisionError("no luck")

    async def main() -> None:
        async with story.registry.lifespan() as lifespan:
            await anyio.sleep(1)
            assert lifespan[outbox].state == "crashed"
            story.lines.append("the body goes on")

    in_time(main, backend)
    assert story.lines[-4:] == ["outbox crashed", "outbox crashed", "the body goes on", "db closes"]


@backends
def test_what_comes_at_intervals_waits_between_its_runs_and_fails_like_any(backend: str) -> None:
    registry = Registry()
    began: list[float] = []

    @registry.worker(every=60.0, limit=(1, 1000.0))
    async def purge() -> None:
        began.append(anyio.current_time())
        await anyio.sleep(5)
        if len(began) in (2, 4):
            raise ZeroDivisionError

    async def main() -> None:
        start = anyio.current_time()
        with pytest.raises(CrashError):
            async with registry.lifespan() as lifespan:
                await anyio.sleep(71)
                assert lifespan[purge].state == "restarting"
                await anyio.sleep_forever()
        assert [round(at - start) for at in began] == [0, 65, 130, 195]

    in_time(main, backend)


@backends
@pytest.mark.parametrize(
    ("restart", "state", "runs"), [("on-failure", "ended", 1), ("always", "waiting", 8)]
)
def test_a_run_that_returns_is_the_last_one_unless_it_is_run_always(
    backend: str, restart: Any, state: str, runs: int
) -> None:
    registry, ran = Registry(), list[int]()

    @registry.worker(restart=restart)
    async def outbox() -> None:
        ran.append(1)

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            await anyio.sleep(13)
            assert lifespan[outbox].state == state
            assert (await lifespan.health()).resources["outbox"].state == "ok"
            assert lifespan[outbox].restarts == len(ran) - 1
        assert len(ran) >= runs

    in_time(main, backend)


@backends
def test_at_the_stop_a_worker_may_finish_within_its_drain_and_is_cancelled_then(backend: str) -> None:
    story = Story()

    async def work(name: str, seconds: float) -> None:
        stopping = lifekit.stopping()
        await stopping.wait()
        try:
            await anyio.sleep(seconds)
            story.lines.append(f"{name} finished")
        except anyio.get_cancelled_exc_class():
            story.lines.append(f"{name} cancelled")
            raise

    @story.registry.worker(story.db, drain=5.0)
    async def quick(db: str) -> None:
        await work("quick", 4)

    @story.registry.worker(story.db, drain=5.0)
    async def slow_one(db: str) -> None:
        await work("slow_one", 6)

    @story.registry.worker(story.db, drain=5.0, every=60.0)
    async def between_runs(db: str) -> None: ...

    async def main() -> None:
        async with story.registry.lifespan():
            await anyio.sleep(1)
            story.lines.clear()
            began = anyio.current_time()
        assert round(anyio.current_time() - began, 3) == 5

    in_time(main, backend)
    assert story.lines == [
        *("between_runs ended", "quick finished", "quick ended"),
        *("slow_one cancelled", "slow_one ended", "db closes"),
    ]


@backends
def test_the_picture_of_the_stop_shows_how_long_workers_took_to_end(backend: str) -> None:
    story = Story()

    @story.registry.worker(story.db, drain=5.0)
    async def outbox(db: str) -> None:
        await lifekit.stopping().wait()
        await anyio.sleep(3)

    async def main() -> None:
        async with story.registry.lifespan() as lifespan:
            await checkpoint()
        spans = {span.resource: round(span.seconds, 3) for span in lifespan.shutdown.spans}
        assert spans["outbox"] == 3.0
        assert lifespan.shutdown.critical_path == ("outbox", "db")

    in_time(main, backend)


@backends
def test_a_drain_leaves_half_of_the_grace_to_what_is_behind(backend: str) -> None:
    story = Story(grace=20.0)

    @story.registry.resource
    async def ledger() -> AsyncGenerator[None]:
        yield
        await anyio.sleep(8)
        story.lines.append("ledger saved")

    @story.registry.worker(ledger, drain=100.0)
    async def outbox(ledger: None) -> None:
        await anyio.sleep_forever()

    async def main() -> None:
        async with story.registry.lifespan():
            await checkpoint()
            began = anyio.current_time()
        assert round(anyio.current_time() - began, 3) == 10 + 8

    in_time(main, backend)
    assert story.lines[-1] == "ledger saved"


@backends
def test_a_worker_that_ignores_its_cancellation_is_left_behind_and_named(backend: str) -> None:
    released: list[anyio.Event] = []
    registry = Registry("shop", close_timeout=2.0)

    @registry.worker(close_timeout=3.0)
    async def deaf() -> None:
        released.append(anyio.Event())
        with anyio.CancelScope(shield=True):
            await released[0].wait()  # here it stands

    async def main() -> None:
        began = 0.0
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                await checkpoint()
                await checkpoint()
                began = anyio.current_time()
        assert round(anyio.current_time() - began, 3) == 3
        assert re.search(
            r"deaf \(tests/test_workers\.py:\d+\): close took longer than 3 s and ignored its "
            r"cancellation: its task was left behind\n    it stood at\n.*# here it stands",
            str(caught.value),
        )
        released[0].set()
        await anyio.sleep(1)

    in_time(main, backend)


@backends
def test_a_worker_that_fails_while_it_ends_is_a_closing_that_failed(backend: str) -> None:
    registry = Registry()

    @registry.worker
    async def outbox() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ShutdownError) as caught:
            async with registry.lifespan():
                await checkpoint()
                await checkpoint()
        assert caught.group_contains(ZeroDivisionError)

    in_time(main, backend)


@backends
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_a_worker_exits_with_ends_the_body_before_anything_closes(
    backend: str, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    story = Story()

    @story.registry.worker(story.db)
    async def outbox(db: str) -> None:
        await anyio.sleep(1)
        raise kind(7)

    async def main() -> None:
        with pytest.raises(kind):
            async with story.registry.lifespan() as lifespan:
                try:
                    await anyio.sleep(100)
                    story.lines.append("the body went on")
                finally:
                    story.lines.append(f"the body ends with {lifespan[story.db]}")

    in_time(main, backend)
    assert {"the body ends with db", "outbox ended"} == set(story.lines[-3:-1])
    assert story.lines[-1] == "db closes"
    assert f"shop is asked to stop: {kind.__name__}" in caplog.text


@pytest.mark.parametrize(
    ("backend", "left"), [("asyncio", "a scope"), ("asyncio", "a task group"), ("trio", "a scope")]
)
@pytest.mark.parametrize("every", [None, 5.0])
def test_a_worker_that_leaves_something_of_its_task_open_crashes(
    backend: str, left: str, every: float | None
) -> None:
    """Where a nursery is left open, trio itself ends all that it runs."""
    story, runs = Story(), list[object]()

    @story.registry.worker(every=every)
    async def outbox() -> None:
        if left == "a scope":
            runs.append(anyio.CancelScope().__enter__())
        else:
            runs.append(await anyio.create_task_group().__aenter__())

    async def main() -> None:
        lifespan = story.registry.lifespan()
        with pytest.raises(CrashError) as caught:
            async with lifespan:
                await anyio.sleep(100)
        assert lifespan[outbox].state == "crashed"
        assert "outbox left a cancel scope or a task group open" in str(caught.value)
        assert len(runs) == 1

    in_time(main, backend)
    assert story.lines[-3:] == ["outbox crashed", "outbox crashed", "db closes"]


def test_a_worker_that_somebody_else_cancels_has_failed_and_runs_again() -> None:
    story, tasks = Story(), list[asyncio.Task[Any]]()

    @story.registry.worker
    async def outbox() -> None:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type] # pyright: ignore
        await anyio.sleep_forever()

    async def main() -> None:
        async with story.registry.lifespan() as lifespan:
            await anyio.sleep(1)
            tasks[0].cancel()
            await anyio.sleep(1)
            assert lifespan[outbox].restarts == 1
            assert len(tasks) == 2

    in_time(main, "asyncio")
    assert "outbox failed: outbox was cancelled, not by lifekit" in story.lines


def test_workers_end_in_order_when_every_task_is_cancelled() -> None:
    """As a runner does, in which the loop ends under an open lifespan."""
    story = Story()

    @story.registry.worker(story.db, drain=5.0)
    async def outbox(db: str) -> None:
        await lifekit.stopping().wait()
        await anyio.sleep(1)
        story.lines.append("drained")

    async def main() -> None:
        await story.registry.lifespan().__aenter__()
        await checkpoint()

    run(main, "asyncio")
    assert story.lines[-3:] == ["drained", "outbox ended", "db closes"] or story.lines[-2:] == [
        "outbox ended",
        "db closes",
    ]
    assert not any("crashed" in line for line in story.lines)


def test_the_pause_after_a_run_that_lasted_is_short_again() -> None:
    supervision = Supervision(Rules(limit=(100, 60.0)))
    delays = [supervision.failed(0.0, now) for now in range(10)]
    again = supervision.failed(61.0, 100.0)
    assert delays[-1] is not None
    assert delays[-1] > 10
    assert again is not None
    assert again <= 0.1


def test_failures_longer_ago_than_the_limits_seconds_are_forgotten() -> None:
    supervision = Supervision(Rules(limit=(2, 10.0)))
    assert [supervision.failed(1.0, now) is None for now in (0, 6, 12, 18, 19)] == [
        *(False, False, False, False),
        True,
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": -1}, "every=-1"),
        ({"restart": "sometimes"}, 'It takes "on-failure" or "always" or "never"'),
        ({"on_crash": "explode"}, 'It takes "stop" or "unready" or "ignore"'),
        ({"limit": 5}, "limit=(5, 60.0)"),
        ({"drain": "long"}, "drain='long'"),
        ({"retry": 3}, "a worker has no option retry"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_where_it_stands(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(DeclarationError, match=re.escape(text)) as caught:
        Registry().worker(**options)
    assert "tests/test_workers.py" in str(caught.value)


def test_what_is_not_async_and_a_resource_on_a_worker_are_refused() -> None:
    registry = Registry()
    with pytest.raises(DeclarationError, match="a worker is an async function, and this builtin"):
        registry.worker(print)  # type: ignore[arg-type] # pyright: ignore

    @registry.worker
    async def outbox() -> None: ...

    with pytest.raises(DeclarationError, match="can't need outbox, which is a worker"):
        registry.resource(outbox)
