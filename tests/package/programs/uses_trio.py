"""A lifespan under trio."""

from collections.abc import AsyncGenerator

import trio

from lifekit import Registry

registry = Registry("trio")


@registry.resource
async def nursery() -> AsyncGenerator[trio.Nursery]:
    """A nursery of trio's."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def main() -> None:
    """Let a task live as long as the lifespan."""
    async with registry.lifespan() as lifespan:
        lifespan[nursery].start_soon(trio.sleep_forever)
        print(len(nursery.get().child_tasks))
        used = lifespan[nursery]
    print(len(used.child_tasks))


trio.run(main)
