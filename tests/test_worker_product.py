"""Whatever a worker does, at whichever moment: what it needs outlives it, and nothing is hidden.

{returns, raises, hangs, ignores its cancellation, exits} x {at once, later, at the stop, in an
override, in a block}, in virtual time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import anyio
import pytest

import lifekit
from lifekit import CrashError, DeadlineError, Registry, ShutdownError, testing

from .leaks import tasks_alive
from .virtual_time import run

MOMENTS = ("at once", "later", "at the stop", "in an override", "in a block")
DEEDS = ("returns", "raises", "hangs", "ignores", "exits")


class World:
    """One case, and what was seen of it."""

    def __init__(self, deed: str, moment: str) -> None:
        self.deed, self.moment = deed, moment
        self.log: list[str] = []
        self.released = anyio.Event()
        self.registry = registry = Registry("shop")

        @registry.resource
        async def base() -> AsyncGenerator[str]:
            self.log.append("base opens")
            yield "base"
            self.log.append("base closes")

        @registry.worker(base, restart="never", drain=1.0)
        async def worker(base: str) -> None:
            self.log.append(f"works with {base}")
            try:
                await self.work()
            finally:
                self.log.append(f"ends with {base}")

        self.base = base

    async def work(self) -> None:
        """Wait for the moment, and do it."""
        match self.moment:
            case "later":
                await anyio.sleep(1)
            case "at the stop":
                await lifekit.stopping().wait()
            case _:
                pass
        match self.deed:
            case "raises":
                raise ZeroDivisionError
            case "hangs":
                await anyio.sleep_forever()
            case "ignores":
                with anyio.CancelScope(shield=True):
                    await self.released.wait()
            case "exits":
                raise SystemExit(3)
            case _:
                pass

    async def live(self) -> None:
        """Run the application, and let it work for ten seconds."""
        async with AsyncExitStack() as stack:
            if self.moment == "in a block":
                stack.enter_context(testing.sandboxing())
            async with self.registry.lifespan() as lifespan:
                if self.moment == "in a block":
                    async with lifespan.sandbox():
                        await anyio.sleep(10)
                elif self.moment == "in an override":
                    async with lifespan.override(self.base, "other"):
                        await anyio.sleep(10)
                else:
                    await anyio.sleep(10)

    @property
    def raises(self) -> type[BaseException] | None:
        """What comes out of it."""
        match self.deed:
            case "raises":
                return ShutdownError if self.moment == "at the stop" else CrashError
            case "ignores":
                return DeadlineError if self.moment == "in a block" else ShutdownError
            case "exits":
                return SystemExit
            case _:
                return None


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("deed", DEEDS)
def test_what_a_worker_needs_outlives_it_and_nothing_is_hidden(
    backend: str, moment: str, deed: str
) -> None:
    async def main() -> None:
        before, world = tasks_alive(), World(deed, moment)
        raised: BaseException | None = None
        try:
            await world.live()
        except BaseException as error:
            raised = error
        assert type(raised) is (world.raises or type(None)), raised
        assert world.log.count("base opens") == world.log.count("base closes") == 1
        assert "works with base" in world.log or moment == "in a block"
        closed = world.log.index("base closes")
        if deed != "ignores":
            assert closed == len(world.log) - 1
        world.released.set()
        await anyio.sleep(1)
        assert tasks_alive() == before

    run(main, backend)
