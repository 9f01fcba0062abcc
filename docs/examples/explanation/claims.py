"""What `compare.md` says of each library: one program for each row of its first table."""

import asyncio
from collections.abc import Awaitable, Callable

from .peers import PEERS, Cache, Links, Start, World


async def run(start: Start) -> None:
    async with start() as running:
        await running.links()


async def opens_at_once(make: Callable[[World], Start]) -> bool:
    world = World(meets=True)
    await run(make(world))
    return "both are opening" in world.events


async def failed_start_closes(make: Callable[[World], Start]) -> bool:
    world = World(fails_to_open="cache")
    await asyncio.gather(run(make(world)), return_exceptions=True)
    return "db opened" in world.events and "db closed" in world.events


async def failed_closing_stops_none(make: Callable[[World], Start]) -> bool:
    world = World(fails_to_close=("links",))
    await asyncio.gather(run(make(world)), return_exceptions=True)
    return {"db closed", "cache closed"} <= set(world.events)


async def all_failures_are_raised(make: Callable[[World], Start]) -> bool:
    world = World(fails_to_close=("links", "db"))
    [error] = await asyncio.gather(run(make(world)), return_exceptions=True)
    told: list[str] = []
    while isinstance(error, BaseException):
        told += [str(each) for each in getattr(error, "exceptions", [error])]
        error = error.__context__
    return {"links can't be closed", "db can't be closed"} <= set(told)


async def cancellation_skips_none(make: Callable[[World], Start]) -> bool:
    world = World(waits_in_closing="links")
    task = asyncio.create_task(run(make(world)))
    await world.closing.wait()
    task.cancel()
    world.released.set()
    await asyncio.wait([task])
    return {"db closed", "cache closed"} <= set(world.events)


async def runs_again(make: Callable[[World], Start]) -> bool:
    start = make(World())
    seen: list[Links] = []
    for _ in range(2):
        async with start() as running:
            seen.append(await running.links())
    return seen[0] is not seen[1]


async def override_reaches_what_is_built(make: Callable[[World], Start]) -> bool:
    fake = Cache()
    async with make(World())() as running:
        await running.links()
        async with running.override(fake):
            return (await running.links()).cache is fake


async def another_loop_is_refused(make: Callable[[World], Start]) -> bool:
    async with make(World())() as running:

        async def elsewhere() -> Links:
            return await running.links()

        try:
            await asyncio.to_thread(asyncio.run, elsewhere())
        except Exception as error:
            return "opened in" in str(error)
        return False


CLAIMS: dict[str, Callable[[Callable[[World], Start]], Awaitable[bool]]] = {
    "independent ones open at the same time": opens_at_once,
    "a failed start closes what had opened": failed_start_closes,
    "a closing that fails stops no other": failed_closing_stops_none,
    "the errors of all closings are raised": all_failures_are_raised,
    "a cancelled shutdown skips no closing": cancellation_skips_none,
    "the same declarations can run again": runs_again,
    "an override reaches what was built before it": override_reaches_what_is_built,
    "use in another event loop is refused": another_loop_is_refused,
}


async def main() -> None:
    for claim, holds in CLAIMS.items():
        found = {name: "yes" if await holds(make) else "no" for name, make in PEERS.items()}
        print(f"| {claim} | {' | '.join(found.values())} |")


if __name__ == "__main__":
    asyncio.run(main())
