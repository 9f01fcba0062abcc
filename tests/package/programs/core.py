"""Uses lifekit with nothing but what it needs itself."""

import asyncio
from collections.abc import AsyncGenerator

from lifekit import NotOpenError, Registry, testing

registry = Registry("core")


@registry.resource
def settings() -> dict[str, str]:
    """A plain value."""
    return {"greeting": "hello"}


@registry.resource(settings)
async def greeter(settings: dict[str, str]) -> AsyncGenerator[list[str]]:
    """One with a closing."""
    print("opens")
    yield [settings["greeting"]]
    print("closes")


async def main() -> None:
    """Open and close, with an override too."""
    async with registry.lifespan() as lifespan:
        print(lifespan[greeter][0], greeter.get()[0])
    with registry.override(settings, {"greeting": "goodbye"}), testing.sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            print(lifespan[greeter][0])
    try:
        greeter.get()
    except NotOpenError:
        print("not open")


asyncio.run(main())
