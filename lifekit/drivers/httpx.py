"""What lifekit knows about the async clients of httpx (0.27, 0.28) and of httpx2 (2.16).

Either may be installed without the other, so neither is imported: types go by name and shape.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from lifekit._core.drivers import Driver, judge
from lifekit._core.errors import DeclarationError
from lifekit._util.redact import redact

_PACKAGES = {"httpx", "httpx2"}


class Client(Protocol):
    """What both AsyncClients have."""

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called."""
        ...

    @property
    def base_url(self) -> Any:
        """The URL that relative ones are joined to; an empty one by default."""
        ...

    def aclose(self) -> Awaitable[object]:
        """Close the transports."""
        ...


class HttpxDriver(Driver[Client]):
    """Async clients of httpx and httpx2."""

    async def open(self, value: Client) -> Client:
        """Take a client that is not closed yet."""
        name = _package(type(value))
        if value.is_closed:
            raise DeclarationError(
                f"this {name} client is closed already. Return {name}.AsyncClient(...) from the "
                "factory, so that each lifespan gets its own."
            )
        return value

    def close(self, value: Client) -> Awaitable[object]:
        """Close the connections, those in use too."""
        return value.aclose()

    def describe(self, value: Client) -> str:
        """Return its base URL, without login and query: either may hold a token."""
        name, url = f"{_package(type(value))} client", value.base_url
        if not url.host:
            return name
        bare = url.copy_with(userinfo=b"***" if url.userinfo else b"", query=None, fragment=None)
        return redact(f"{name}, {bare}")

    def transient(self, error: BaseException) -> bool:
        """Return whether no connection could be made, unless for the server's certificate."""
        return judge(error) is True


def _package(kind: type) -> str | None:
    """Return the package of *kind*, or of its nearest base there."""
    return next((base.__module__ for base in kind.__mro__ if base.__module__ in _PACKAGES), None)


driver: HttpxDriver = HttpxDriver()
