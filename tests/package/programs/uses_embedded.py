"""The servers of lifekit.embedded."""

import asyncio
import os
from contextlib import AbstractAsyncContextManager

from lifekit import Registry, embedded

registry = Registry("embedded")


@registry.resource
def postgres() -> AbstractAsyncContextManager[embedded.Server]:
    """PostgreSQL."""
    return embedded.postgres()


@registry.resource
def valkey() -> AbstractAsyncContextManager[embedded.Server]:
    """Valkey."""
    return embedded.valkey()


async def main() -> None:
    """Run both."""
    async with registry.lifespan() as lifespan:
        servers = [lifespan[postgres], lifespan[valkey]]
        for server in servers:
            os.kill(server.pid or 0, 0)
            print(server.url.partition(":")[0])
    for server in servers:
        try:
            os.kill(server.pid or 0, 0)
        except ProcessLookupError:
            print("gone")


os.environ["PATH"] = ""  # where this machine's own servers may be
asyncio.run(main())
