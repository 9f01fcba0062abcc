"""Clients of an application whose lifespan runs, sandboxed if asked for."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from lifekit._core.block import current_block
from lifekit._core.errors import LifekitError
from lifekit._util.asgi import ASGIApp

from ._app import Running, running
from ._websocket import transport_for

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from starlette.testclient import TestClient


@asynccontextmanager
async def client(
    app: ASGIApp, *, sandbox: bool = False, workers: bool = True, **options: Any
) -> AsyncGenerator[AsyncClient]:
    """Run the application around ``async with``, and give a client that sends it requests.

    The application starts at the ``async with``, in this event loop, and stops at its end, whatever the
    body did. An override of this context holds for it.

    Args:
        app: The ASGI application.
        sandbox: Undo all that the body let the application do to values that lifekit can sandbox. What
            its lifespan itself does while it starts and stops is real.
        workers: Run the application's workers; with ``sandbox``, they run inside of it.
        options: Those of httpx2's (else httpx's) ``AsyncClient``, of which ``base_url`` is
            ``http://test`` by default, and of its ``ASGITransport``: ``raise_app_exceptions``,
            ``root_path``, ``client``; and ``client_class``, a class to use instead of ``AsyncClient``.

    Raises:
        StartupError: At the ``async with``; another lifespan's own errors come likewise.
        ShutdownError: At its end, likewise. Where the body failed, that error gets it as a note.
        SandboxError: It has no lifespan of lifekit's to sandbox.
        SandboxEscapedError: At the end: something is still in use, or could not be undone.
    """
    _httpx()
    async with (
        running(app, sandboxed=sandbox, workers=workers) as served,
        served.sandbox() if sandbox else nullcontext(),
        client_of(served, **options) as made,
    ):
        yield made


def client_of(
    served: Running,
    *,
    base_url: object = None,
    client_class: type[AsyncClient] | None = None,
    raise_app_exceptions: bool = True,
    root_path: str = "",
    client: tuple[str, int] = ("127.0.0.1", 123),
    **options: Any,
) -> AsyncClient:
    """Return a client of an application that runs; there may be any number of them."""
    httpx = _httpx()
    transport = transport_for(httpx)(
        served.app, raise_app_exceptions=raise_app_exceptions, root_path=root_path, client=client
    )
    # What the environment says of proxies and logins is not for an application in the same process.
    options.setdefault("trust_env", False)
    make: Any = client_class or httpx.AsyncClient
    made = make(
        transport=transport, base_url=_at_test(httpx) if base_url is None else base_url, **options
    )
    if not hasattr(made, "websocket"):
        made.websocket = _no_websockets
    return cast("AsyncClient", made)


def _no_websockets(*args: object, **options: object) -> None:
    raise LifekitError(
        "httpx has no websockets, and httpx2 has: pip install 'httpx2[ws]', and lifekit's client is "
        "httpx2's. Or write a sync test: sync_client.websocket_connect(url)."
    )


@contextmanager
def sync_client(
    app: ASGIApp,
    *,
    sandbox: bool = False,
    workers: bool = True,
    backend: Literal["asyncio", "trio"] = "asyncio",
    backend_options: dict[str, Any] | None = None,
    **options: Any,
) -> Generator[TestClient]:
    """Run the application around ``with``, in a thread of its own, and give Starlette's ``TestClient``.

    All else is as with `client`; an override of the calling thread's context holds for it, too.

    Args:
        app: The ASGI application.
        sandbox: Undo all that the body let the application do to values that lifekit can sandbox. What
            its lifespan itself does while it starts and stops is real.
        workers: Run the application's workers; with ``sandbox``, they run inside of it.
        backend: The kind of event loop.
        backend_options: AnyIO's, such as ``{"use_uvloop": True}``.
        options: The other ones of ``TestClient``, and ``sync_client_class``, a class to use instead.

    Raises:
        StartupError: At the ``with``; another lifespan's own errors come likewise.
        ShutdownError: At its end, likewise. Where the body failed, that error gets it as a note.
        SandboxError: It has no lifespan of lifekit's to sandbox.
        SandboxEscapedError: At the end: something is still in use, or could not be undone.
    """
    _httpx()
    with (
        start_blocking_portal(backend, backend_options) as portal,
        portal.wrap_async_context_manager(running(app, sandboxed=sandbox, workers=workers)) as served,
        sandbox_in(portal, served) if sandbox else nullcontext(),
        sync_client_of(served, portal, **options) as made,
    ):
        yield made


@contextmanager
def sync_client_of(
    served: Running,
    portal: BlockingPortal,
    *,
    sync_client_class: type[TestClient] | None = None,
    **options: Any,
) -> Generator[TestClient]:
    """Give a client of an application that runs in the event loop of *portal*."""
    from starlette.testclient import TestClient

    if "headers" in options:
        options["headers"] = dict(options["headers"])  # to which TestClient adds its own
    made = (sync_client_class or TestClient)(served.app, **options)
    made.app = served.application  # whose dependency_overrides tests set
    made.app_state = served.state
    made.portal = portal
    with closing(made):  # cuts off responses that are still being streamed
        yield made


@contextmanager
def sandbox_in(portal: BlockingPortal, served: Running, workers: bool = True) -> Generator[None]:
    """Sandbox, around ``with``, an application that runs in the event loop of *portal*."""
    with portal.wrap_async_context_manager(served.sandbox(workers=workers)) as block:
        outer = current_block.get()
        current_block.set(block)  # what the calling thread sends into the loop is inside
        try:
            yield
        finally:
            if current_block.get() is block:
                current_block.set(outer)


class OptionError(LifekitError):
    """Options for clients that no client knows."""


def known_options(options: object, which: Literal["client", "sync_client"]) -> dict[str, Any]:
    """Return those of `lifekit_client_options` that one of the two clients knows.

    Raises:
        OptionError: They are no dict, or neither of them knows one.
    """
    if not isinstance(options, dict):
        raise OptionError(
            f"lifekit_client_options gives a {type(options).__name__}, and a dict is expected: "
            'return {"base_url": "https://shop.test", "headers": {…}}'
        )
    if not options:
        return {}
    from starlette.testclient import TestClient

    given: dict[str, Any] = {str(key): value for key, value in options.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    httpx = _httpx()
    known = {
        "client": _names(
            client_of, httpx.ASGITransport, given.get("client_class") or httpx.AsyncClient
        ),
        "sync_client": _names(sync_client_of, given.get("sync_client_class") or TestClient),
    }
    unknown = given.keys() - known["client"] - known["sync_client"]
    if unknown:
        raise OptionError(
            f"lifekit_client_options has {', '.join(sorted(unknown))}, which neither client knows. "
            f"client takes {', '.join(sorted(known['client']))}; "
            f"sync_client takes {', '.join(sorted(known['sync_client']))}."
        )
    return {key: value for key, value in given.items() if key in known[which]}


@functools.cache
def _names(*functions: Any) -> frozenset[str]:
    given = {"self", "app", "served", "portal", "options", "transport", "backend", "backend_options"}
    return frozenset(name for each in functions for name in inspect.signature(each).parameters) - given


@functools.cache
def _at_test(httpx: ModuleType) -> object:
    return httpx.URL("http://test")  # half of what a client costs is to read this


def _httpx() -> ModuleType:
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise LifekitError(
        "the clients of lifekit.testing need httpx2, or httpx: pip install 'lifekit[httpx2]'"
    )
