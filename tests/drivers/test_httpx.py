"""The driver of httpx and httpx2, on real connections, on trio too: so do they."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.abc
import httpx
import httpx2
import pytest

from lifekit._core.errors import DeclarationError
from lifekit.drivers.httpx import driver

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("package", [httpx, httpx2], ids=["httpx", "httpx2"])


class Server:
    """A web server that keeps its connections open."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.hung_up = anyio.Event()

    async def serve(self, stream: anyio.abc.SocketStream) -> None:
        """Answer each request, until the client hangs up."""
        async with stream:
            async for _ in stream:
                await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        self.hung_up.set()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A web server."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    server = Server(listener.extra(anyio.abc.SocketAttribute.local_port))
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server.serve)
        yield server
        tasks.cancel_scope.cancel()


@both
async def test_close_hangs_up(package: Any, server: Server) -> None:
    """The connections that it kept for the next request are closed."""
    client = package.AsyncClient()
    await driver.check(client)
    assert (await client.get(server.url)).text == "ok"
    await driver.close(client)
    assert driver.wait_closed(client) is None
    assert client.is_closed
    with anyio.fail_after(60):
        await server.hung_up.wait()


@both
async def test_terminate_waits_for_nothing(package: Any) -> None:
    """There is no way to cut a client off, so it does nothing, before and after the closing."""
    client = package.AsyncClient()
    assert await driver.open(client) is client
    assert driver.terminate(client) is None
    await driver.close(client)
    assert driver.terminate(client) is None


@both
async def test_open_refuses_a_client_that_is_closed(package: Any) -> None:
    """One made at import time and closed by an earlier lifespan: the message says the mend."""
    client = package.AsyncClient()
    await client.aclose()
    mend = rf"{package.__name__} client is closed already\. Return {package.__name__}\.AsyncClient"
    with pytest.raises(DeclarationError, match=mend):
        await driver.open(client)


@both
@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", ""),
        ("https://api.example.org/v1", ", https://api.example.org/v1/"),
        ("http://127.0.0.1:8080", ", http://127.0.0.1:8080"),
        ("https://shop:hush@api.example.org", ", https://***@api.example.org"),
        ("https://hush@api.example.org", ", https://***@api.example.org"),
        ("https://api.example.org/?key=hush#hush", ", https://api.example.org/"),
    ],
)
def test_describe_tells_the_base_url(package: Any, url: str, text: str) -> None:
    """Without what may be a password or a token."""
    assert driver.describe(package.AsyncClient(base_url=url)) == f"{package.__name__} client{text}"


@both
def test_describe_knows_a_users_subclass(package: Any) -> None:
    """Its package is the one that it comes from."""
    mine = type("Mine", (package.AsyncClient,), {})
    assert driver.describe(mine()) == f"{package.__name__} client"


@both
async def test_a_refused_port_is_transient(package: Any) -> None:
    """The server is not up yet."""
    async with package.AsyncClient() as client:
        with pytest.raises(package.ConnectError) as caught:
            await client.get("http://127.0.0.1:1")
    assert driver.transient(caught.value)


@both
def test_only_a_failure_to_connect_is_transient(package: Any) -> None:
    """What came after it may have done something already."""
    assert driver.transient(package.ConnectTimeout("too slow"))
    assert not driver.transient(package.ReadTimeout("too slow"))
    assert not driver.transient(package.ReadError("reset"))
    assert not driver.transient(package.UnsupportedProtocol("no http"))
    assert not driver.transient(ConnectionError("another's"))


@both
def test_a_bad_certificate_is_not_transient(package: Any) -> None:
    """It is a ConnectError as well, and stays bad."""
    error = package.ConnectError("certificate verify failed")
    error.__cause__ = OSError()
    error.__cause__.__context__ = ssl.SSLCertVerificationError()
    assert not driver.transient(error)
