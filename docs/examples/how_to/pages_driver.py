"""What lifekit has to know of that client."""

import os

from lifekit import Registry

# --8<-- [start:driver]
from lifekit.drivers import Driver, Sandbox, register

from .pages import Pages


class PagesDriver(Driver[Pages]):
    async def open(self, value: Pages) -> Pages:
        await value.connect()
        return value

    async def check(self, value: Pages) -> None:
        await value.ping()

    def close(self, value: Pages) -> None:
        value.close()

    async def wait_closed(self, value: Pages) -> None:
        await value.wait_closed()

    def terminate(self, value: Pages) -> None:
        value.abort()

    def describe(self, value: Pages) -> str:
        return f"pages at {value.host}:{value.port}"

    def sandbox(self, value: Pages) -> Sandbox:
        return PagesSandbox(value)


# --8<-- [end:driver]
# --8<-- [start:sandbox]
class PagesSandbox(Sandbox):
    """Inside a block the client works in a space of this process, which is empty."""

    def __init__(self, pages: Pages) -> None:
        self.pages, self.outside = pages, pages.space
        self.inside = f"test-{os.getpid()}-{id(self):x}"

    async def begin(self) -> None:
        self.pages.space = self.inside

    async def end(self) -> None:
        self.pages.space = self.outside
        await self.pages.clear(self.inside)


# --8<-- [end:sandbox]
# --8<-- [start:use]
register(Pages, PagesDriver())
registry = Registry("site")


@registry.resource(retry=3)
def pages() -> Pages:
    return Pages("127.0.0.1", int(os.environ["PAGES_PORT"]))


# --8<-- [end:use]
