"""Real servers, one of each for the whole run, and a database of its own for who asks."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from importlib import import_module

import pytest
from anyio.from_thread import start_blocking_portal

from lifekit import embedded

# A guard against hangs: on a busy machine initdb alone may take as long as it has elsewhere.
embedded._START_SECONDS = 300.0  # pyright: ignore[reportPrivateUsage]

os.environ.pop("DATABASE_URL", None)
os.environ.pop("REDIS_URL", None)
# A script's `make test &` has a shell ignore Ctrl-C, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave out of each later collection of garbage what the modules of all tests consist of."""
    # Its plugin does that later, and then finds no referrers, which are frozen.
    import_module("hypothesis")
    gc.collect()
    gc.freeze()


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param("trio", id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Every test marked anyio runs on asyncio, uvloop and trio, unless its module narrows it."""
    return request.param


def _served(server: AbstractAsyncContextManager[embedded.Server]) -> Iterator[embedded.Server]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[embedded.Server]:
    """A real PostgreSQL server, shared by the run; its sessions are those of the tests alone."""
    yield from _served(embedded.postgres(settings={"autovacuum": "off"}))


@pytest.fixture(scope="session")
def valkey() -> Iterator[embedded.Server]:
    """A real Valkey server, shared by the run."""
    yield from _served(embedded.valkey())
