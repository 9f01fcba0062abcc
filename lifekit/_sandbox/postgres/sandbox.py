"""The sandbox of all that speaks to PostgreSQL in one lifespan: a gateway, and who connects by it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from weakref import ref

import anyio
from anyio.lowlevel import checkpoint

from lifekit._core.block import Block, current_block
from lifekit._core.drivers import Driver, Isolation, Leased, Sandbox, Tls
from lifekit._core.errors import SandboxBusyError, SandboxEscapedError, SandboxUnsupportedError
from lifekit._core.resource import Resource
from lifekit._sandbox.doors import close_doors, open_doors
from lifekit._sandbox.stores import refusal
from lifekit._sandbox.waits import waits_for
from lifekit._util.loops import running_loop
from lifekit.drivers._checkouts import Connected, Pooled, current_task
from lifekit.drivers._doors import by_way_of, chosen

from .gateway import PORT, Gateway, Server
from .joined import JoinedLoop
from .place import Place

if TYPE_CHECKING:
    from lifekit.drivers._checkouts import Checkout

T = TypeVar("T")
GIVING_BACK = 1.0
"""Seconds in which a connection comes back whose task has ended."""
_PATIENCE = 10.0


class _Made(NamedTuple):
    """A connection that came through a door: lifekit has no value that it belongs to."""

    connection: ref[Any]
    number: Callable[[Any], int | None]
    checkout: Checkout


class _Past:
    """The gateway of what is to last: none."""

    def pool(self, *what: object) -> Any:
        """Return nothing: no block is told of it."""

    def sqlite(self, *what: object) -> Any:
        """Return nothing, likewise."""

    def knows(self, number: int | None) -> bool:
        """Return that all is as it is to be."""
        return True


_past: Any = _Past()


class PostgresSandbox(Isolation):
    """What a lifespan's clients of PostgreSQL share in test mode."""

    def __init__(self) -> None:
        """Begin, in the lifespan's event loop."""
        self.process: int = os.getpid()
        self._loop = running_loop()
        self._lock = threading.Lock()
        self._gateway: Gateway | None = None
        self._pools: list[PoolSandbox[Any]] = []
        self._made: list[_Made] = []
        self._begun: list[bool] = []  # for each block: whether the gateway knows of it
        self._blocks: list[tuple[Block | None, asyncio.Task[Any] | None]] = []  # and who began it
        open_doors(self)

    @property
    def is_open(self) -> bool:
        """Whether there is a block."""
        return bool(self._begun)

    # -- what drivers point their values at ------------------------------------------------------------

    @property
    def gateway(self) -> Gateway:
        """The gateway, which exists as soon as somebody wants it."""
        with self._lock:
            if self._gateway is None:
                place = Place()
                if running_loop() is not self._loop:  # of which nobody knows how long it runs
                    place.move_into_thread()
                self._gateway = Gateway(place)
                self._gateway.explains = self._explain
                for _ in self._begun:
                    self._gateway.hub.begin()
                self._begun = [True] * len(self._begun)
            return self._gateway

    def socket(self, host: str, port: int, *, tls: Tls | None = None) -> tuple[str, int]:
        """Return the folder and the port of a unix socket that leads to a server."""
        self.serves_threads()
        server, gateway = self._server(host, port, tls), self.gateway
        with self._lock:
            return gateway.folder(server), PORT

    def port(self, host: str, port: int, *, tls: Tls | None = None) -> int:
        """Return the port of this machine that leads to a server."""
        self.serves_threads()
        server, gateway = self._server(host, port, tls), self.gateway
        with self._lock:
            return gateway.port(server)

    def url(self, url: str) -> str:
        """Return the URL that leads to where *url* leads."""
        from lifekit.drivers._libpq import redirected_url

        return redirected_url(url, self)

    def _server(self, host: str, port: int, tls: Tls | None) -> Server:
        if "," in host:
            raise SandboxUnsupportedError(
                f"several servers for one client, as in {host!r}: the sandbox knows one. Name one in "
                "the test's settings."
            )
        return self.gateway.behind(host, port) or Server(host, port, tls)

    def leads_here(self, host: object, port: object) -> bool:
        """Return whether an address is the gateway's own."""
        gateway, number = self._gateway, f"{port or PORT}"
        if gateway is None or not number.isdigit():
            return False
        return gateway.behind(f"{host}", int(number)) is not None

    def serves_threads(self) -> None:
        """Run in a thread from now on: who blocks this one, as libpq's cancel does, can be served.

        Raises:
            SandboxBusyError: The event loop, in which it still runs, is blocked.
        """
        place = self.gateway.place
        if place.has_thread:
            return
        if place.is_here:
            place.move_into_thread()
            return
        moved: concurrent.futures.Future[None] = concurrent.futures.Future()

        def move() -> None:
            place.move_into_thread()
            moved.set_result(None)

        place.loop.call_soon_threadsafe(move)
        try:
            moved.result(_PATIENCE)
        except TimeoutError:
            raise SandboxBusyError(
                "a thread connects to PostgreSQL, and the event loop of the lifespan has been blocked "
                f"for {_PATIENCE:.3g} s, perhaps by code that waits for that thread. Let it wait by "
                "await: asyncio.to_thread, or loop.run_in_executor."
            ) from None

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the running event loop, whose connections are made by way of the gateway."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self.serves_threads()
        joined: Any = JoinedLoop(loop, self.gateway, is_nobodys=chosen.get() is None)
        return joined  # type: ignore[no-any-return]

    def lets_last(self) -> AbstractContextManager[None]:
        """Let what connects inside ``with`` last: it is for a value that is declared so."""
        return by_way_of(_past)

    def let_last(self, driver: Any, value: Any) -> None:
        """Let what a value connects from now on last."""
        if issubclass(type(driver), Pooled):
            driver.redirect(value, _past)

    def made(self, connection: Any, number: Callable[[Any], int | None], checkout: Checkout) -> bool:
        """Take note of a connection that came through a door; *number* tells that of its process.

        Return whether that is needed: a pool of lifekit's looks after its own.
        """
        if chosen.get() is not None:
            return False
        known = [each for each in self._made if each.connection() is not None]
        self._made = [*known, _Made(ref(connection), number, checkout)]
        return True

    def pool(self, driver: Pooled[T], value: T) -> PoolSandbox[T]:
        """Return the sandbox of a value that hands out connections."""
        made = PoolSandbox(self, driver, value)
        self._pools.append(made)
        return made

    def drop(self, pool: PoolSandbox[Any]) -> None:
        """Forget a value that closes."""
        pool.driver.restore(pool.value)
        self._pools = [each for each in self._pools if each is not pool]

    # -- who has what ----------------------------------------------------------------------------------

    def _checkout(self, number: int) -> tuple[Checkout, str] | None:
        for pool in self._pools:
            for connection in pool.driver.out(pool.value):
                if pool.driver.number(connection) == number:
                    checkout = pool.driver.checkouts.of(connection)
                    if checkout is not None:
                        return checkout, pool.driver.checkouts.package
        for each, its_number in self._now_made():
            if its_number == number:
                return each.checkout, ""
        return None

    def _now_made(self) -> Iterator[tuple[_Made, int]]:
        """Yield what came through doors and is still connected, with its number."""
        clients = self._gateway.hub.clients if self._gateway is not None else {}
        for each in self._made:
            connection = each.connection()
            number = each.number(connection) if connection is not None else None
            if number is not None and number in clients:
                yield each, number

    def _explain(self, waiting: int, holding: int) -> tuple[str, bool]:
        """Return who has a connection for which another one waits, and whether that can't end."""
        holder = self._checkout(holding)
        if holder is None:
            return self._called(holding), False
        waiter = self._checkout(waiting)
        where = holder[0].in_full(holder[1])
        if waiter is None:
            return f"It was acquired at {where}.", False
        who = f"The waiting one was acquired at {waiter[0]}. The other one was acquired at {where}."
        return who, waits_for(holder[0].task, waiter[0].task)

    def _called(self, number: int) -> str:
        """Return what a client says of itself, of which nobody knows here: a subprocess, perhaps."""
        client = self._gateway.hub.clients.get(number) if self._gateway is not None else None
        options = client.relay.options if client is not None and client.relay is not None else {}
        name = options.get(b"application_name", b"").decode("utf-8", "replace")
        return f"It calls itself {name!r}." if name else ""

    def knows(self, number: int | None) -> bool:
        """Return whether the connection of that number goes, or went, by way of the gateway.

        One that says no number says nothing, or is lost.
        """
        return not number or (self._gateway is not None and self._gateway.hub.has_seen(number))

    async def cut(self, number: int | None) -> None:
        """Cut off the connection of that number."""
        if self._gateway is not None and number is not None:
            await self._gateway.cut(number)

    def cancel(self, number: int | None) -> None:
        """End what the connection of that number does, as soon as that is possible; in any thread."""
        if self._gateway is not None and number is not None:
            self._gateway.cancel(number)

    # -- blocks ----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Let nothing last from now on.

        Raises:
            SandboxBusyError: It is to be inside of a block in which a transaction is open.
            SandboxEscapedError: Or one of which something is lost.
        """
        open_doors(self)  # of what has been imported since
        self._blocks.append((current_block.get(), current_task()))
        self._begun.append(self._gateway is not None)
        if self._gateway is None:
            return
        begun = await self._gateway.begin()
        if begun.lost:
            raise SandboxEscapedError(_LOST.format(begun.lost))
        if begun.busy is not None:
            raise SandboxBusyError(_AMID.format(begun.busy))
        if begun.has_closed:
            await checkpoint()  # then clients have heard of it

    async def end(self) -> None:
        """Undo what was done.

        Raises:
            SandboxEscapedError: Something ended the real transaction.
        """
        left = await self._cut_off_those_left()
        self._blocks.pop()
        if not self._begun.pop() or self._gateway is None:
            return
        wrong = left + await self._gateway.end()
        if self._gateway.hub.schema_undone:
            for pool in self._pools:
                await pool.driver.forget_schema(pool.value)
        if wrong:
            raise SandboxEscapedError("\n".join(wrong))

    def end_at_once(self) -> bool:
        """Do so where nothing is under way, and no client has to forget a schema."""
        if next(self._left(), None) is not None:
            return False
        wrong: list[str] | None = []
        if self._begun[-1] and self._gateway is not None:
            wrong = self._gateway.end_at_once()
            if wrong is None:
                return False
        self._blocks.pop()
        self._begun.pop()
        if wrong:
            raise SandboxEscapedError("\n".join(wrong))
        return True

    async def _cut_off_those_left(self) -> list[str]:
        """Cut off what tasks that the block started, and that go on, have connected by themselves."""
        await lets_go(lambda: not list(self._left()))
        left = list(self._left())
        for _, number in left:
            await self.cut(number)
        if not left:
            return []
        lines = "".join(f"  a connection opened at {each.checkout.in_full('')}\n" for each, _ in left)
        why = (
            f"when the sandbox ended, this was still in use:\n{lines}Its code outlived the test. Let "
            "the test wait for it, or the application where it starts it. It was closed."
        )
        return [why]

    def _left(self) -> Iterator[tuple[_Made, int]]:
        block, began = self._blocks[-1]
        for each, number in self._now_made():
            task, its = each.checkout.task, each.checkout.block
            goes_on = task is not None and not task.done() and task is not began
            if goes_on and its is not None and not (block is None or block.is_outside(its)):
                yield each, number

    # -- what it gives to other values -------------------------------------------------------------

    def lease(self, client: Any, described: str) -> Leased:
        """Return the sandbox of a client of Redis."""
        from lifekit._sandbox.redis.client import sandbox  # here, for it imports redis

        return sandbox(client, described, self)

    def sqlite(self, driver: Any, value: Any) -> Sandbox:
        """Return the sandbox of an engine on SQLite, or of a connection of aiosqlite."""
        if issubclass(type(driver), Pooled):
            from lifekit._sandbox.sqlite.engines import EngineSandbox  # here, for it imports sqlalchemy

            return EngineSandbox(self, driver, value)
        from lifekit._sandbox.sqlite.connections import ConnectionSandbox  # and this aiosqlite

        return ConnectionSandbox(self, value)

    def refusal(
        self,
        resource: Resource[Any],
        value: object,
        needs: Iterable[object],
        driver: Driver[Any] | None,
    ) -> Sandbox | None:
        """Return what refuses blocks for *value*; None where it reaches nothing, or can be undone."""
        return refusal(resource, value, needs, driver)

    def finish(self) -> None:
        """Close all that there is, with the lifespan."""
        close_doors(self)
        if self._gateway is not None:
            self._gateway.close()


_AMID = (
    "a sandbox can't begin inside another one while a transaction of the outer one is open: its end "
    "would undo a part of that.{0}\nCommit it, and give the connection back, before the inner sandbox "
    "begins."
)
_LOST = (
    "a sandbox can't begin inside another one that has lost its connection to PostgreSQL, and with it "
    "what was done there: {0}\nLeave the outer one, and begin it anew."
)


class PoolSandbox(Sandbox, Generic[T]):
    """What sees to it that a test gives back what it took from one value."""

    def __init__(self, postgres: PostgresSandbox, driver: Pooled[T], value: T) -> None:
        self.driver, self.value = driver, value
        self._postgres = postgres
        self._begun: list[tuple[Block | None, list[Any]]] = []  # and what was out then

    async def begin(self) -> None:
        """Note what is out already: it is in the block with what it does next.

        Raises:
            SandboxEscapedError: It is not, for the factory had taken it before lifekit had the value.
        """
        out = self.driver.out(self.value)
        self._begun.append((current_block.get(), [ref(each) for each in out]))
        for each in out:
            if not self._postgres.knows(self.driver.number(each)):
                checkout = self.driver.checkouts.of(each)
                raise SandboxEscapedError(
                    f"a connection acquired at {checkout or 'an unknown line'} was made before its "
                    "lifespan opened, so that what it does would be permanent. Let the factory make "
                    "what it returns."
                )

    async def end(self) -> None:
        """Take back what the test, or what it started, did not give back.

        Raises:
            SandboxEscapedError: There is something.
        """
        block, before = self._begun.pop()
        resting = self.driver.rest(self.value)
        if resting is not None:
            await resting
        if not (strays := await self._left_over(block, before)):
            return
        told = self._escaped(strays)
        for each in strays:
            await self._postgres.cut(self.driver.number(each))
            taken = self.driver.take_back(self.value, each)
            if taken is not None:
                await taken
        raise told

    def end_at_once(self) -> bool:
        """Do so where there is nothing."""
        rests = isinstance(self.driver, Connected) and any(
            self.driver.is_in_transaction(each) for each in self.driver.out(self.value)
        )
        if rests or next(self._strays(*self._begun[-1]), None) is not None:
            return False
        self._begun.pop()
        return True

    async def _left_over(self, block: Block | None, before: list[Any]) -> list[Any]:
        await lets_go(lambda: next(self._strays(block, before), None) is None)
        # Where its task has ended, the driver may give it back just now: asyncpg waits there for what
        # it cancels.
        until = anyio.current_time() + GIVING_BACK
        while strays := list(self._strays(block, before)):
            if anyio.current_time() >= until or not any(map(self._is_over, strays)):
                break
            await anyio.sleep(0.005)
        return strays

    def _is_over(self, connection: Any) -> bool:
        checkout = self.driver.checkouts.of(connection)
        return checkout is not None and checkout.is_over

    def _strays(self, block: Block | None, before: list[Any]) -> Iterator[Any]:
        known = {id(each) for known in before if (each := known()) is not None}
        for each in self.driver.out(self.value):
            if id(each) in known:
                continue
            checkout = self.driver.checkouts.of(each)
            # What was begun outside, the application's own loop, is waited for where it works.
            if checkout is None or block is None or not block.is_outside(checkout.block):
                yield each

    def _escaped(self, strays: Iterable[Any]) -> SandboxEscapedError:
        driver = self.driver
        lines: list[str] = []
        for each in strays:
            checkout = driver.checkouts.of(each)
            who = checkout.in_full(driver.checkouts.package) if checkout else "an unknown line"
            amid = " in a transaction" if driver.is_in_transaction(each) else ""
            lines.append(f"  a connection{amid} acquired at {who}")
        return SandboxEscapedError(
            "when the sandbox ended, this had not been given back:\n"
            + "\n".join(lines)
            + "\nIts code outlived the test. Let the test wait for it, or the application where it "
            f"starts it; and give it back whatever happens: {driver.use}. It was closed."
        )

    async def close(self) -> None:
        """Forget the value."""
        self._postgres.drop(self)

    def terminate(self) -> None:
        """Forget it."""
        self._postgres.drop(self)


async def lets_go(is_free: Callable[[], bool]) -> None:
    """Let tasks that are about to end do so, for a hundred rounds of the event loop."""
    for _ in range(100):
        if is_free():
            return
        await checkpoint()
