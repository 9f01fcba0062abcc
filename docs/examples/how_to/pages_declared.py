"""The same client without a driver: the declaration says all."""

# --8<-- [start:declared]
import os

from lifekit import Registry

from .pages import Pages

registry = Registry("site")


@registry.resource(retry=3, check="ping", terminate="abort")
async def pages() -> Pages:
    pages = Pages("127.0.0.1", int(os.environ["PAGES_PORT"]))
    await pages.connect()
    return pages


# --8<-- [end:declared]
