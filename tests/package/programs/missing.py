"""Uses what needs an extra, and prints what is said without it."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from lifekit import embedded, testing
from lifekit.asgi import ASGIApp


async def app(*_: object) -> None:
    """An application that is never reached."""


async def enter(make: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    """Say why it can't be entered."""
    try:
        async with make():
            print("entered")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


async def main(app: ASGIApp) -> None:
    """Try one after the other."""
    await enter(embedded.valkey)
    await enter(lambda: testing.client(app))
    try:
        with testing.sync_client(app):
            print("entered")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    try:
        testing.fake_redis()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


os.environ["PATH"] = ""  # where this machine's own servers may be
asyncio.run(main(app))
