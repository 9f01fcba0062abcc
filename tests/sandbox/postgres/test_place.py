"""Where a gateway runs: who may do something in place of its thread, and when."""

from __future__ import annotations

import asyncio
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from lifekit._sandbox.postgres.place import Idleness, Place
from lifekit._sandbox.postgres.wires import Wire
from lifekit.embedded import Server

from .clients import Psycopg2, running_gateway, through

T = TypeVar("T")
pytestmark = pytest.mark.anyio


@pytest.fixture
def place() -> Iterator[Place]:
    """One with a thread of its own, whose event loop checks who calls it."""
    made = Place()  # outside of any event loop
    made.loop.set_debug(True)
    yield made
    made.end_thread()


def at_last(place: Place, call: Callable[[], T]) -> T:
    """Have something called in place of the thread, as soon as that has nothing to do."""
    while (found := place.at_once(call)) is None:
        pass
    return found


async def test_another_thread_does_something_while_the_own_one_has_nothing_to_do(place: Place) -> None:
    assert at_last(place, threading.get_ident) == threading.get_ident()


async def test_it_does_nothing_while_the_own_one_works(place: Place) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        goes_on.wait()

    place.post(work)
    assert begun.wait(30)
    assert place.at_once(threading.get_ident) is None
    goes_on.set()
    assert at_last(place, threading.get_ident) == threading.get_ident()


def test_a_place_is_not_idle_once_something_has_come() -> None:
    selector = Idleness()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        selector.register(ours, 1)
        assert selector.is_idle()
        theirs.send(b"x")
        assert not selector.is_idle()
    selector.close()


async def test_a_timer_set_in_place_of_the_thread_rings_in_the_thread(place: Place) -> None:
    rang: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def ring() -> None:
        rang.get_loop().call_soon_threadsafe(rang.set_result, threading.get_ident())

    at_last(place, lambda: place.later(0, ring))
    assert await asyncio.wait_for(rang, 30) != threading.get_ident()


async def test_what_a_socket_does_not_take_at_once_is_sent_by_the_thread(place: Place) -> None:
    ours, theirs = socket.socketpair()
    sent = b"x" * 10_000_000
    wire = at_last(place, lambda: Wire(place, ours, lambda data: None, lambda: None))

    def write() -> bool:
        wire.write(sent)
        return True

    at_last(place, write)

    def receive() -> int:
        taken = 0
        while taken < len(sent) and (data := theirs.recv(1 << 20)):
            taken += len(data)
        return taken

    assert await asyncio.to_thread(receive) == len(sent)
    place.post(wire.close)
    assert await asyncio.to_thread(theirs.recv, 1) == b""
    theirs.close()


async def test_a_block_begins_and_ends_without_the_thread(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_gateway(in_thread=True) as gateway:
        client = await Psycopg2.open(through(postgres.url, gateway))
        at_last(gateway.place, threading.get_ident)

        async def hand_over(call: object) -> None:
            raise AssertionError("the thread was woken")

        with monkeypatch.context() as patch:
            patch.setattr(gateway.place, "run", hand_over)
            await gateway.begin()
        assert await client.value("SELECT 1") == 1
        at_last(gateway.place, threading.get_ident)
        assert gateway.end_at_once() == []
        await client.close()


async def test_what_the_thread_has_no_time_for_waits_for_it_in_its_order(place: Place) -> None:
    begun, goes_on, done = threading.Event(), threading.Event(), list[int]()

    def work() -> None:
        begun.set()
        goes_on.wait()

    place.post(work)
    assert begun.wait(30)
    for number in range(3):
        place.do(done.append, number)
    assert done == []
    goes_on.set()
    place.do(done.append, 3)
    at_last(place, threading.get_ident)
    assert done == [0, 1, 2, 3]


def test_what_another_thread_has_closed_while_it_waited_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selector = Idleness()
    ours, theirs = socket.socketpair()
    select = selectors.DefaultSelector.select

    def meanwhile(self: selectors.DefaultSelector, timeout: float | None = None) -> Any:
        found = select(self, timeout)
        selector.unregister(ours)
        ours.close()
        return found

    with theirs, selector.taken:
        selector.register(ours, selectors.EVENT_READ)
        theirs.send(b"!")
        monkeypatch.setattr(selectors.DefaultSelector, "select", meanwhile)
        assert selector.select(30) == []
