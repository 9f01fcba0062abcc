"""`registry.blocking()`: a lifespan for code without an event loop."""

from __future__ import annotations

import asyncio
import signal
import threading
import traceback
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest

import lifekit
from lifekit import (
    CrashError,
    LifekitError,
    NotOpenError,
    Registry,
    ShutdownError,
    StartupError,
)


class Shop:
    """A registry, and what happened."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.registry = Registry("shop")
        self.fails: dict[str, Exception] = {}

        @self.registry.resource
        async def db() -> AsyncGenerator[str]:
            if "open" in self.fails:
                raise self.fails["open"]
            self.lines.append("opened")
            yield "db"
            await anyio.lowlevel.checkpoint()
            self.lines.append("closed")
            if "close" in self.fails:
                raise self.fails["close"]

        self.db = db


@pytest.fixture
def shop() -> Any:
    before = set(threading.enumerate())
    yield Shop()
    assert set(threading.enumerate()) <= before


async def _add(first: int, second: int) -> int:
    await anyio.lowlevel.checkpoint()
    return first + second


def test_values_are_at_hand_and_calls_run_in_its_loop(shop: Shop) -> None:
    with shop.registry.blocking() as lifespan:
        assert (lifespan[shop.db], lifespan["db"], shop.db.get()) == ("db", "db", "db")
        assert lifespan.call(_add, 1, 2) == 3
        assert lifespan.call(shop.db.get) == "db"
        assert lifespan.call(lifespan.health).ready
        assert lifespan.call(threading.get_ident) != threading.get_ident()
    assert shop.lines == ["opened", "closed"]
    with pytest.raises(LifekitError, match="does not run"):
        lifespan.call(_add, 1, 2)
    with pytest.raises(NotOpenError):
        lifespan[shop.db]


def test_overrides_around_it_hold(shop: Shop) -> None:
    with shop.registry.override(shop.db, "fake"), shop.registry.blocking() as lifespan:
        assert lifespan[shop.db] == "fake"
    assert shop.lines == []


def test_what_a_call_raises_is_raised_and_nothing_else_ends(shop: Shop) -> None:
    with shop.registry.blocking() as lifespan:
        with pytest.raises(ZeroDivisionError):
            lifespan.call(lambda: 1 / 0)
        assert lifespan.call(_add, 1, 2) == 3


def test_a_cancellation_that_a_call_meets_is_its_own_and_nothing_else_ends(shop: Shop) -> None:
    async def awaits_what_was_cancelled() -> None:
        task = asyncio.ensure_future(asyncio.sleep(0))
        task.cancel()
        await task

    with shop.registry.blocking() as lifespan:
        with pytest.raises(asyncio.CancelledError):
            lifespan.call(awaits_what_was_cancelled)
        assert lifespan.call(_add, 1, 2) == 3


def test_it_runs_once_and_the_one_that_runs_goes_on(shop: Shop) -> None:
    lifespan = shop.registry.blocking()
    with lifespan:
        with pytest.raises(LifekitError, match="make another one"), lifespan:
            pytest.fail("it was entered twice")
        assert lifespan.call(_add, 1, 2) == 3
    assert shop.lines == ["opened", "closed"]


def test_all_is_closed_when_the_script_raises(shop: Shop) -> None:
    with pytest.raises(ZeroDivisionError), shop.registry.blocking():
        raise ZeroDivisionError
    assert shop.lines == ["opened", "closed"]


def test_a_failed_start_and_a_failed_closing_are_raised(shop: Shop) -> None:
    shop.fails["close"] = ValueError("no luck")
    with pytest.raises(ShutdownError, match="no luck"), shop.registry.blocking():
        shop.lines.append("body")
    shop.fails["open"] = ValueError("no luck")
    with pytest.raises(StartupError, match="no luck"), shop.registry.blocking():
        shop.lines.append("never")
    assert shop.lines == ["opened", "body", "closed"]


def test_ctrl_c_cancels_the_call_and_closes_all(shop: Shop) -> None:
    async def wait() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            shop.lines.append("cancelled")

    with pytest.raises(KeyboardInterrupt), shop.registry.blocking() as lifespan:
        lifespan.call(wait)
    assert shop.lines == ["opened", "cancelled", "closed"]


def test_ctrl_c_while_it_closes_waits_for_that(shop: Shop) -> None:
    @shop.registry.resource(shop.db)
    async def slow(db: str) -> AsyncGenerator[None]:
        yield
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        await anyio.sleep(0.05)  # for as long as this the main thread waits
        shop.lines.append("slow closed")

    with pytest.raises(KeyboardInterrupt), shop.registry.blocking():
        pass
    assert shop.lines == ["opened", "slow closed", "closed"]


def test_a_crash_ends_the_call_and_is_raised_once(shop: Shop) -> None:
    crash: list[bool] = []

    @shop.registry.worker(shop.db, restart="never")
    async def outbox(db: str) -> None:
        while not crash:
            await anyio.lowlevel.checkpoint()
        raise ValueError("no luck")

    async def wait() -> None:
        crash.append(True)
        await anyio.sleep_forever()

    with pytest.raises(CrashError, match="no luck") as caught, shop.registry.blocking() as lifespan:
        lifespan.call(wait)
    assert "lifespan.call(wait)" in "".join(traceback.format_tb(caught.tb))
    assert shop.lines == ["opened", "closed"]


def test_a_crash_between_calls_is_raised_at_the_end(shop: Shop) -> None:
    @shop.registry.worker(shop.db, restart="never")
    async def outbox(db: str) -> None:
        raise ValueError("no luck")

    with pytest.raises(CrashError, match="no luck"), shop.registry.blocking():
        shop.lines.append("body")
    assert sorted(shop.lines) == ["body", "closed", "opened"]  # it is closed as soon as it has crashed


def test_a_stop_cancels_the_call_under_way(shop: Shop) -> None:
    async def stop() -> None:
        lifekit.stopping()
        lifespan.stop()
        await anyio.sleep_forever()

    with shop.registry.blocking() as lifespan:
        with pytest.raises(LifekitError, match="shop was stopped while a call ran"):
            lifespan.call(stop)
        with pytest.raises(LifekitError, match="was stopped"):
            lifespan.call(_add, 1, 2)
    assert shop.lines == ["opened", "closed"]


def test_a_call_from_its_own_loop_is_refused(shop: Shop) -> None:
    with (
        shop.registry.blocking() as lifespan,
        pytest.raises(LifekitError, match="Await the function itself"),
    ):
        lifespan.call(lambda: lifespan.call(_add, 1, 2))
