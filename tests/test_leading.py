"""Leaders and exclusive blocks, with a lock of the tests' own, in virtual time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import lifekit
from lifekit import CrashError, DeclarationError, LifekitError, Registry, drivers, events
from lifekit._core import drivers as core_drivers
from lifekit._core.leading import LEASE

from .virtual_time import block, in_time

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Server:
    """Where locks are: who has which, until when, and the number of the last leader."""

    def __init__(self) -> None:
        self.numbers = count(1)
        self.held: dict[str, tuple[object, float]] = {}
        self.open: set[object] = set()
        self.fails: Exception | None = None
        self.hangs = False


class ServerLock:
    """A lock on a `Server`."""

    def __init__(self, server: Server, key: str) -> None:
        self.server, self.key = server, key

    async def _reach(self) -> None:
        await checkpoint()
        if self.server.hangs:
            await anyio.sleep_forever()
        if self.server.fails is not None:
            raise self.server.fails

    async def open(self, lease: float) -> None:
        await checkpoint()
        self.server.open.add(self)

    async def acquire(self, lease: float) -> int | None:
        await self._reach()
        holder, until = self.server.held.get(self.key, (None, 0.0))
        if holder is not None and until > anyio.current_time():
            return None
        self.server.held[self.key] = self, anyio.current_time() + lease
        return next(self.server.numbers)

    async def pause(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def renew(self, lease: float) -> bool:
        await self._reach()
        if self.server.held.get(self.key, (None, 0.0))[0] is not self:
            return False
        self.server.held[self.key] = self, anyio.current_time() + lease
        return True

    async def release(self) -> None:
        await checkpoint()
        self.server.open.discard(self)
        if self.server.held.get(self.key, (None, 0.0))[0] is self:
            del self.server.held[self.key]


class ServerDriver(drivers.Driver[Server]):
    """What gives such locks."""

    def lock(self, value: Server, key: str) -> ServerLock:
        return ServerLock(value, key)


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    drivers.register(Server, ServerDriver())
    yield
    core_drivers._registered.pop(Server)  # pyright: ignore[reportPrivateUsage]


class Fleet:
    """A registry whose worker leads, as several lifespans of one process run it."""

    def __init__(self, **options: Any) -> None:
        self.server = Server()
        self.registry = Registry("shop", on_event=self.hear)
        self.lines: list[str] = []
        self.runs = 0  # at the same time
        self.fails: Exception | None = None
        self.lasts = float("inf")

        @self.registry.resource
        def lock() -> Server:
            return self.server

        @self.registry.worker(leader=lock, **options)
        async def purge() -> None:
            self.runs += 1
            assert self.runs == 1
            try:
                self.lines.append(f"run {lifekit.leadership().number}")
                if self.fails is not None:
                    raise self.fails
                await anyio.sleep(self.lasts)
            finally:
                self.runs -= 1

        self.lock, self.purge = lock, purge

    def hear(self, event: events.Event) -> None:
        match event:
            case events.Leading():
                self.lines.append(f"leads {event.number}")
            case events.LeadershipLost():
                self.lines.append(f"lost {event.number}: {event.reason}")
            case _:
                pass


@backends
def test_one_leads_and_the_next_one_when_it_has_ended(backend: str) -> None:
    fleet = Fleet()

    async def main() -> None:
        async with fleet.registry.lifespan() as second:
            async with fleet.registry.lifespan() as first:
                await anyio.sleep(100)
                states = sorted([first[fleet.purge].state, second[fleet.purge].state])
                assert states == ["running", "standby"]
                leader = first if first[fleet.purge].state == "running" else second
                assert (await leader.health()).ready
            await anyio.sleep(LEASE)
            assert second[fleet.purge].state == "running"

    in_time(main, backend)
    assert fleet.lines[0] == "run 1" or fleet.lines[0] == "leads 1"
    assert not fleet.server.held
    assert not fleet.server.open


@backends
def test_a_leader_that_has_lost_the_lock_is_cancelled_and_waits_to_lead_again(backend: str) -> None:
    fleet = Fleet()

    async def main() -> None:
        async with fleet.registry.lifespan() as lifespan:
            await anyio.sleep(100)
            other, _ = object(), fleet.server.held.popitem()
            fleet.server.held["shop.purge"] = other, anyio.current_time() + 30
            await anyio.sleep(LEASE / 10 + 0.1)
            assert lifespan[fleet.purge].state == "standby"
            await anyio.sleep(40)
            assert lifespan[fleet.purge].state == "running"
            assert lifespan[fleet.purge].restarts == 0

    in_time(main, backend)
    assert [line for line in fleet.lines if line.startswith("run")] == ["run 1", "run 2"]
    assert "lost 1: another one has it, or its connection is lost" in fleet.lines


@backends
@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_leader_whose_server_does_not_answer_gives_up_before_its_lease_is_over(
    backend: str, how: str
) -> None:
    fleet = Fleet()

    async def main() -> None:
        async with fleet.registry.lifespan() as lifespan:
            await anyio.sleep(100)
            if how == "fails":
                fleet.server.fails = ConnectionError("postgresql://shop:hunter2@db/shop is away")
            else:
                fleet.server.hangs = True
            began = anyio.current_time()
            held_until = fleet.server.held["shop.purge"][1]
            while lifespan[fleet.purge].state == "running":  # noqa: ASYNC110
                await anyio.sleep(0.01)
            assert anyio.current_time() - began < LEASE * 2 / 3 + 0.1
            assert held_until > anyio.current_time()  # until then nobody else can lead
            fleet.server.fails, fleet.server.hangs = None, False
            await anyio.sleep(3 * LEASE)
            assert lifespan[fleet.purge].state == "running"

    in_time(main, backend)
    (lost,) = (line for line in fleet.lines if line.startswith("lost"))
    if how == "fails":
        assert lost == "lost 1: ConnectionError: postgresql://shop:***@db/shop is away"
    else:
        assert lost == "lost 1: its server did not answer in time"


@backends
def test_a_short_failure_costs_nothing(backend: str) -> None:
    fleet = Fleet()

    async def main() -> None:
        async with fleet.registry.lifespan():
            await anyio.sleep(100)
            fleet.server.fails = ConnectionError("away")
            await anyio.sleep(LEASE / 3)
            fleet.server.fails = None
            await anyio.sleep(100)

    in_time(main, backend)
    assert sorted(fleet.lines) == ["leads 1", "run 1"]


@backends
def test_who_can_not_tell_who_leads_says_so_once_and_goes_on(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet()
    fleet.server.fails = ConnectionError("postgresql://shop:hunter2@db/shop is away")

    async def main() -> None:
        async with fleet.registry.lifespan() as lifespan:
            await anyio.sleep(1000)
            assert lifespan[fleet.purge].state == "standby"
            fleet.server.fails = None
            await anyio.sleep(LEASE)
            assert lifespan[fleet.purge].state == "running"

    in_time(main, backend)
    (warning,) = (each for each in caplog.records if each.levelno == logging.WARNING)
    assert warning.message == (
        "purge can't tell yet who leads: ConnectionError: postgresql://shop:***@db/shop is away"
    )


@backends
@pytest.mark.parametrize("drain", [0.0, 1000.0])
def test_who_waits_to_lead_ends_at_once(backend: str, drain: float) -> None:
    fleet = Fleet(drain=drain)
    fleet.server.held["shop.purge"] = object(), float("inf")

    async def main() -> None:
        async with fleet.registry.lifespan():
            await anyio.sleep(100)
            began = anyio.current_time()
        assert anyio.current_time() - began < 0.01

    in_time(main, backend)
    assert not fleet.server.open
    assert not fleet.lines


@backends
def test_a_leader_leads_on_between_its_runs_and_after_its_failures(backend: str) -> None:
    fleet = Fleet(every=60.0, limit=(10, 60.0))
    fleet.lasts = 5.0

    async def main() -> None:
        async with fleet.registry.lifespan() as first, fleet.registry.lifespan() as second:
            await anyio.sleep(200)
            fleet.fails = ValueError("no luck")
            await anyio.sleep(70)
            fleet.fails = None
            await anyio.sleep(130)
            states = [first[fleet.purge].state, second[fleet.purge].state]
            assert states.count("standby") == 1
            await anyio.sleep(1)
            fleet.lines.append("end")

    in_time(main, backend)
    lines = fleet.lines[: fleet.lines.index("end")]
    assert lines.count("run 1") == 7
    assert {line for line in lines if line != "run 1"} == {"leads 1"}


@backends
def test_between_its_runs_a_leader_may_lose_the_lock_as_well(backend: str) -> None:
    fleet = Fleet(every=1000.0)
    fleet.lasts = 5.0

    async def main() -> None:
        async with fleet.registry.lifespan() as lifespan:
            await anyio.sleep(100)
            assert lifespan[fleet.purge].state == "waiting"
            fleet.server.held.clear()
            await anyio.sleep(LEASE)
            assert lifespan[fleet.purge].state in ("running", "waiting")

    in_time(main, backend)
    assert [line for line in fleet.lines if line.startswith("run")] == ["run 1", "run 2"]


@backends
def test_what_a_cancelled_leader_raises_is_told(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    registry, server = Registry("shop"), Server()

    @registry.resource
    def lock() -> Server:
        return server

    @registry.worker(leader=lock)
    async def purge() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("no luck")

    async def main() -> None:
        with pytest.raises(lifekit.ShutdownError, match="no luck"):
            async with registry.lifespan():
                await anyio.sleep(100)
                server.held.clear()
                await anyio.sleep(100)

    in_time(main, backend)
    assert "purge failed, and is run again in 0.00 s: ValueError: no luck" in caplog.text


@backends
def test_a_crash_of_a_leader_gives_the_lock_to_the_next(backend: str) -> None:
    fleet = Fleet(restart="never", on_crash="ignore")
    fleet.fails = ValueError("no luck")

    async def main() -> None:
        async with fleet.registry.lifespan() as first:
            await anyio.sleep(100)
            assert first[fleet.purge].state == "crashed"
            fleet.fails = None
            async with fleet.registry.lifespan() as second:
                await anyio.sleep(1)
                assert second[fleet.purge].state == "running"

    in_time(main, backend)
    assert not fleet.server.open


@backends
def test_an_overridden_leader_is_no_lock(backend: str) -> None:
    fleet = Fleet()
    fleet.server.fails = ConnectionError("never asked")

    async def main() -> None:
        with fleet.registry.override(fleet.lock, fleet.server):
            async with fleet.registry.lifespan() as lifespan:
                await anyio.sleep(1)
                assert lifespan[fleet.purge].state == "running"

    in_time(main, backend)
    assert len(fleet.lines) == 1
    assert fleet.lines[0].startswith("run ")


@backends
def test_what_can_hold_no_lock_is_a_crash_by_name(backend: str) -> None:
    registry = Registry("shop")

    @registry.resource
    def queue() -> list[str]:
        return []

    @registry.worker(leader=queue)
    async def purge() -> None:
        pytest.fail("it never runs")

    async def main() -> None:
        with pytest.raises(CrashError, match="purge: a list can hold no lock for several processes"):
            async with registry.lifespan():
                await anyio.sleep_forever()

    in_time(main, backend)


@pytest.mark.parametrize("leader", ["db", 1, object()])
def test_a_leader_that_is_no_handle_is_refused(leader: Any) -> None:
    registry = Registry("shop")
    with pytest.raises(DeclarationError, match=r"leader=.* can't be\. It takes the handle of"):
        registry.worker(leader=leader)

    @registry.worker
    async def other() -> None: ...

    with pytest.raises(DeclarationError, match="can't be"):
        registry.worker(leader=other)


def test_a_leader_is_open_for_as_long_as_its_worker_runs() -> None:
    fleet = Fleet()
    assert fleet.purge.after == (fleet.lock,)
    assert fleet.purge.needs == ()


def test_nobody_leads_outside() -> None:
    with pytest.raises(LifekitError, match="nothing leads here"):
        lifekit.leadership()


# -- exclusive blocks ------------------------------------------------------------------------------


@backends
def test_an_exclusive_block_has_one_at_a_time(backend: str) -> None:
    server, inside, numbers = Server(), list[int](), list[int]()

    async def migrate() -> None:
        async with lifekit.exclusive(server, "migrations") as held:
            assert not inside
            inside.append(held.number)
            assert lifekit.leadership() is held
            await anyio.sleep(3 * LEASE)  # for which the lock is renewed
            numbers.append(inside.pop())
        with pytest.raises(LifekitError):
            lifekit.leadership()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(migrate)

    in_time(main, backend)
    assert numbers == [1, 2, 3, 4, 5]
    assert not server.open


@backends
def test_what_an_exclusive_block_raises_is_raised_as_it_is(backend: str) -> None:
    server = Server()

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with lifekit.exclusive(server, "migrations"):
                raise ZeroDivisionError
        server.fails = ConnectionError("away")
        with pytest.raises(ConnectionError):
            async with lifekit.exclusive(server, "migrations"):
                pytest.fail("it is not reached")

    in_time(main, backend)
    assert not server.held


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@backends
def test_what_ends_the_process_leaves_an_exclusive_block_as_it_is(
    backend: str, error: BaseException
) -> None:
    server = Server()

    async def main() -> None:
        with pytest.raises(type(error)) as raised:
            async with lifekit.exclusive(server, "migrations"):
                raise error
        assert raised.value is error

    in_time(main, backend)
    assert not server.held


@backends
def test_an_exclusive_block_that_is_lost_is_cancelled_and_says_so(backend: str) -> None:
    server = Server()

    async def main() -> None:
        with pytest.raises(LifekitError, match="'migrations' was not exclusive any more"):
            async with lifekit.exclusive(server, "migrations"):
                server.held.clear()
                await anyio.sleep_forever()
        with pytest.raises(LifekitError, match="something blocked its event loop"):
            async with lifekit.exclusive(server, "migrations"):
                block(LEASE)
        await checkpoint()

    in_time(main, backend)
    assert not server.open


@backends
def test_waiting_for_an_exclusive_block_can_be_cancelled(backend: str) -> None:
    server = Server()
    server.held["exclusive.migrations"] = object(), float("inf")

    async def main() -> None:
        with pytest.raises(TimeoutError), anyio.fail_after(100):
            async with lifekit.exclusive(server, "migrations"):
                pytest.fail("somebody else is inside")

    in_time(main, backend)
    assert not server.open


@backends
def test_a_handle_names_a_lock_as_well(backend: str) -> None:
    fleet = Fleet()

    async def main() -> None:
        async with fleet.registry.lifespan(), lifekit.exclusive(fleet.lock, "migrations") as held:
            assert held.name == "migrations"

    in_time(main, backend)
