"""Random applications, cut off at random, block after block: nothing hangs, and nothing is left.

python -m tests.sandbox.soak [--blocks 10000] [--seed 1] [--crash-every 200] [--uvloop]
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import sys
import threading
import traceback
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import psycopg2

import lifekit
from lifekit import Registry, SandboxEscapedError, embedded
from lifekit._sandbox.postgres import session
from lifekit._util.call_sites import Site, suspended_frames
from lifekit.testing import sandboxing

from .soak_clients import CLIENTS, Actor, Asyncpg, Broken

LIMIT = 60.0
"""Seconds in which each block ends, or it hangs."""
PATIENCE = 0.1
"""Seconds, in place of five, for which a client waits for one that does nothing."""
SETTLED = 100
"""Blocks after which memory does not grow any more."""
OTHERS = "FROM pg_stat_activity WHERE datname = 'soak' AND pid <> pg_backend_pid() AND pid IS NOT NULL"
LEFT = "SELECT (SELECT count(*) FROM rows), (SELECT count(*) FROM pg_class WHERE relname = 'extra')"
_directly: Any = vars(psycopg2)["_connect"]
"""Past the door that stands there while a sandboxed lifespan runs."""
_OWN = str(Path(lifekit.__file__).parent)
_MISUSE = (AssertionError, AttributeError, KeyError, TypeError, IndexError, RecursionError)
"""What no client raises because something was cut off."""


class Failed(Exception):
    """Something does not hold."""


@dataclass
class Figures:
    """What a run was like."""

    blocks: int = 0
    acts: Counter[str] = field(default_factory=Counter[str])
    outcomes: Counter[str] = field(default_factory=Counter[str])
    cancelled: int = 0
    killed: int = 0
    crashes: int = 0
    escapes: int = 0
    slowest: float = 0.0
    objects: tuple[int, int] = (0, 0)
    """At block `SETTLED`, and at the end."""
    rss: tuple[float, float] = (0.0, 0.0)
    """Megabytes, then and there."""


class Past:
    """A connection that goes past the sandbox, and comes back when the server does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: Any = None

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        until = monotonic() + LIMIT
        while True:
            try:
                if self._connection is None:
                    self._connection = _directly(self._url)
                    self._connection.autocommit = True
                with self._connection.cursor() as cursor:
                    cursor.execute(sql)
                    return list(cursor.fetchall()) if cursor.description else []
            except psycopg2.OperationalError:
                self.close()
                if monotonic() > until:
                    raise

    def close(self) -> None:
        """Close it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Soak:
    """One run over one server of its own."""

    def __init__(self, server: embedded.Server, blocks: int, seed: int, crash_every: int) -> None:
        self.server, self.blocks, self.seed, self.crash_every = server, blocks, seed, crash_every
        self.figures = Figures()
        self.complaints: list[str] = []
        admin = Past(server.url)
        admin.ask("CREATE DATABASE soak")
        admin.close()
        self.url = f"{server.url.rpartition('/')[0]}/soak"
        self.past = Past(self.url)
        self.past.ask("CREATE TABLE rows (tag text, n int CHECK (n > 0), id serial)")

    async def run(self) -> Figures:
        """Run all blocks in one lifespan, then see what is left.

        Raises:
            Failed: Something does not hold.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: self._complain(context.get("exception")))
        logging.getLogger("asyncio").addHandler(heard := _Heard(self._complain))  # the gateway's loop
        registry = Registry("soak", close_timeout=LIMIT)
        actors = [kind(self.url) for kind in CLIENTS]
        handles = [registry.resource(name=each.name)(each.make) for each in actors]
        before = _Left()
        async with AsyncExitStack() as stack:
            with sandboxing():
                lifespan = await stack.enter_async_context(registry.lifespan())
            for actor, handle in zip(actors, handles, strict=True):
                actor.pool = lifespan[handle]
            shaken = False
            for number in range(self.blocks):
                if shaken:
                    await self._heal(actors)
                shaken = await self._block(lifespan, actors, number)
                self.figures.blocks += 1
                if number + 1 in (SETTLED, self.blocks):
                    await _idle(actors)
                    self._weigh()
            await _idle(actors)
        await loop.shutdown_default_executor()
        logging.getLogger("asyncio").removeHandler(heard)
        await self._nothing_is_left(before)
        return self.figures

    def _complain(self, error: BaseException | None) -> None:
        # Drivers leave much behind where they are cancelled; what lifekit raised is another thing.
        if error is None:
            return
        frames = traceback.extract_tb(error.__traceback__)
        if any(_OWN in each.filename for each in frames):
            self.complaints.append("".join(traceback.format_exception(error)))

    async def _heal(self, actors: list[Actor]) -> None:
        # A pool may hand out each of its lost connections once.
        for actor in actors:
            last: Exception | None = None
            for _ in range(20):
                try:
                    await actor.ping()
                    break
                except Exception as error:
                    last = error
            else:
                raise Failed(f"{actor.name} does not recover: {last!r}")

    # -- one block ---------------------------------------------------------------------------------

    async def _block(self, lifespan: Any, actors: list[Actor], number: int) -> bool:
        block = _Block(self, actors, random.Random(f"{self.seed}-{number}"), number)
        began = monotonic()
        stood: list[str] = []  # before anything is cancelled
        hangs = asyncio.get_running_loop().call_later(LIMIT, lambda: stood.append(_stacks()))
        try:
            async with asyncio.timeout(LIMIT + 1):
                try:
                    async with lifespan.sandbox():
                        await block.body()
                except* SandboxEscapedError as error:
                    self.figures.escapes += 1
                    if not (block.shaken or block.leaves):
                        told = "".join(traceback.format_exception(error))
                        raise Failed(f"block {number} was cut off by nobody:\n{told}") from error
        except TimeoutError as error:
            raise Failed(f"block {number} hangs:\n{''.join(stood)}") from error
        finally:
            hangs.cancel()
        block.forget()
        self.figures.slowest = max(self.figures.slowest, monotonic() - began)
        for rows, extra in self.past.ask(LEFT):
            if rows or extra:
                raise Failed(f"after block {number} there are {rows} rows, {extra} tables")
        if self.complaints:
            raise Failed(f"block {number}: the event loop complains: {''.join(self.complaints)}")
        return block.shaken

    def kill(self, rng: random.Random) -> None:
        """End some of the server's sessions."""
        self.figures.killed += 1
        few = "" if rng.random() < 0.3 else f"ORDER BY md5(pid::text || '{rng.random()}') LIMIT 1"
        self.past.ask(f"SELECT pg_terminate_backend(pid) FROM (SELECT pid {OTHERS} {few}) AS these")

    def crash(self) -> None:
        """Kill one of the server's processes, so that it ends all sessions and starts anew."""
        self.figures.crashes += 1
        for (pid,) in self.past.ask(f"SELECT pid {OTHERS} LIMIT 1"):
            os.kill(pid, signal.SIGKILL)

    # -- what is left --------------------------------------------------------------------------------

    def _weigh(self) -> None:
        gc.collect()
        objects, rss = len(gc.get_objects()), psutil.Process().memory_info().rss / 2**20
        figures = self.figures
        figures.objects = figures.objects[0] or objects, objects
        figures.rss = figures.rss[0] or rss, rss

    async def _nothing_is_left(self, before: _Left) -> None:
        until = monotonic() + LIMIT
        while self.past.ask(f"SELECT {OTHERS}") and monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if there := self.past.ask(f"SELECT pid, state, query {OTHERS}"):
            raise Failed(f"connections are left: {there}")
        self.past.close()
        gc.collect()
        until = monotonic() + 5
        while (more := _Left().beyond(before)) and monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if more:
            raise Failed(f"left: {more}")
        first, last = self.figures.objects
        if self.blocks > 2 * SETTLED and last > first * 1.1 + 20_000:
            raise Failed(f"{first} objects at block {SETTLED}, {last} at the end")


class _Heard(logging.Handler):
    """Hears of errors that were only logged."""

    def __init__(self, tell: Callable[[BaseException | None], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it on."""
        self._tell(record.exc_info[1] if record.exc_info else None)


class _Block:
    """What happens in one block."""

    def __init__(self, soak: Soak, actors: list[Actor], rng: random.Random, number: int) -> None:
        self.soak, self.actors, self.rng, self.number = soak, actors, rng, number
        self.shaken = False  # sessions were ended from outside
        self.leaves = False  # something is not given back, or a thread still works
        self.left: set[Actor] = set()
        self.kept: list[Any] = []
        self.committed: list[str] = []

    async def body(self) -> None:
        """Let some tasks act, and others cut them off."""
        rng, soak = self.rng, self.soak
        tasks = [asyncio.create_task(self._task(each)) for each in range(rng.randint(1, 6))]
        others: list[Coroutine[Any, Any, None]] = []
        if rng.random() < 0.4:
            others += [self._cancel(tasks) for _ in range(rng.randint(1, 3))]
        if soak.crash_every and self.number % soak.crash_every == soak.crash_every - 1:
            others.append(self._shake(soak.crash))
        elif rng.random() < 0.04:
            others.append(self._shake(lambda: soak.kill(rng)))
        cutting = [asyncio.create_task(each) for each in others]
        await asyncio.wait(tasks)
        for each in cutting:
            each.cancel()
        await asyncio.gather(*cutting, return_exceptions=True)
        if not self.shaken:
            await self._check()

    async def _task(self, number: int) -> None:
        rng = self.rng
        for step in range(rng.randint(1, 4)):
            actor = rng.choice(self.actors)
            act = rng.choice(actor.acts())
            if act.__name__ in actor.leaving and (self.left or rng.random() < 0.8):
                continue  # or the others do nothing but wait
            tag = f"{self.number}-{number}-{step}"
            name = f"{actor.name}.{act.__name__}"
            self.soak.figures.acts[name] += 1
            if act.__name__ in actor.leaving:
                self.leaves = True
                self.left.add(actor)
            try:
                await act(tag, self.kept)
            except asyncio.CancelledError:
                self.leaves |= actor.threads
                raise
            except Broken:
                self.soak.figures.outcomes["Broken"] += 1
            except _MISUSE as error:
                if not self.shaken:
                    raise Failed(f"block {self.number}, {name}: {error!r}") from error
            except Exception as error:
                self.soak.figures.outcomes[type(error).__name__] += 1
            else:
                self.soak.figures.outcomes["fine"] += 1
                if act.__name__ in actor.writing:
                    self.committed.append(tag)

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.sleep(self.rng.random() ** 2 * 0.05)
        task = self.rng.choice(tasks)
        if not task.done():
            self.soak.figures.cancelled += 1
            task.cancel()

    async def _shake(self, shake: Callable[[], None]) -> None:
        await asyncio.sleep(self.rng.random() * 0.05)
        self.shaken = True
        shake()

    async def _check(self) -> None:
        # Each transaction writes two rows, both or none; what was committed is there.
        asyncpg = self.actors[0]
        assert isinstance(asyncpg, Asyncpg)
        if self.leaves:
            return  # one that does not end may keep this waiting
        try:
            found = dict(await asyncpg.tags())
        except Exception as error:
            raise Failed(f"block {self.number} can't be looked at: {error!r}") from error
        if halves := {tag: count for tag, count in found.items() if count != 2}:
            raise Failed(f"block {self.number}: not two rows each: {halves}")
        if lost := [tag for tag in self.committed if tag not in found]:
            raise Failed(f"block {self.number}: committed, and not there: {lost}")

    def forget(self) -> None:
        """Let go of what was kept."""
        for each in self.kept:
            with suppress(Exception):
                each.close()
        self.kept.clear()


# -- what may be left ---------------------------------------------------------------------------------


class _Left:
    """Threads, tasks and files of this process."""

    def __init__(self) -> None:
        self.threads = {each.name for each in threading.enumerate()}
        self.tasks = len(asyncio.all_tasks())
        self.files = Counter(_files())

    def beyond(self, before: _Left) -> list[str]:
        """Return what was not there before."""
        more = sorted(self.threads - before.threads)
        more += [str(task) for task in asyncio.all_tasks()] if self.tasks > before.tasks else []
        return more + [f"{kind}: {count}" for kind, count in (self.files - before.files).items()]


def _files() -> list[str]:
    found: list[str] = []
    for each in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{each}").partition(":")[0])
    return found


async def _idle(actors: list[Actor]) -> None:
    # What went on in threads, after the tasks that asked for it were cancelled.
    for actor in actors:
        await asyncio.wait_for(asyncio.gather(*actor.works, return_exceptions=True), LIMIT)
        actor.works.clear()


def _stacks() -> str:
    told: list[str] = []
    for task in asyncio.all_tasks():
        told.append(f"{task.get_name()}:")
        told += [str(Site(frame)) for frame in suspended_frames(task.get_coro())]
    for thread, frame in sys._current_frames().items():  # pyright: ignore[reportPrivateUsage]
        told += [f"thread {thread}:", *traceback.format_stack(frame)[-8:]]
    return "\n".join(told)


async def soak(blocks: int, seed: int, crash_every: int = 0) -> Figures:
    """Run so many blocks.

    Raises:
        Failed: Something does not hold.
    """
    before, session.PATIENCE = session.PATIENCE, PATIENCE
    try:
        settings = {"autovacuum": "off", "max_connections": "60"}
        async with embedded.postgres(settings=settings) as server:
            return await Soak(server, blocks, seed, crash_every).run()
    finally:
        session.PATIENCE = before


def main() -> None:
    """Run until all is done, or something does not hold."""
    parser = ArgumentParser(description=__doc__, usage=__doc__)
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--crash-every", type=int, default=200)
    parser.add_argument("--uvloop", action="store_true")
    given = parser.parse_args()
    print(f"--seed {given.seed}", flush=True)
    factory = None
    if given.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    began = monotonic()
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            figures = runner.run(soak(given.blocks, given.seed, given.crash_every))
        except Failed as failed:
            sys.exit(f"--seed {given.seed}: {failed}")
    print(f"{monotonic() - began:.0f} s: {figures}")


if __name__ == "__main__":
    main()
