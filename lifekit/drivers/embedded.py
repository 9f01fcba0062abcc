"""What lifekit knows about `lifekit.embedded.Server`: in test mode its URL leads to the gateway."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from lifekit._core.drivers import Driver, Gateway, Sandbox
from lifekit._util.redact import redact


class _Url(Sandbox):
    """What gives a server its own URL back, when its lifespan ends."""

    def __init__(self, server: Any) -> None:
        self._server, self._url = server, server.url

    def end_at_once(self) -> bool:
        """Do so: nothing was done to it."""
        return True

    async def close(self) -> None:
        """Give it back."""
        self.terminate()

    def terminate(self) -> None:
        """Give it back."""
        object.__setattr__(self._server, "url", self._url)


class ServerDriver(Driver[Any]):
    """Servers as `lifekit.embedded.postgres()` and `valkey()` give them."""

    def describe(self, value: Any) -> str:
        """Return its URL."""
        return redact(value.url)

    def redirect(self, value: Any, gateway: Gateway) -> Sandbox | None:
        """Let whatever takes its URL connect by way of the gateway; subprocesses as well."""
        own: str = value.url
        if not urlsplit(own).scheme.startswith("postgres"):
            return None
        url = _Url(value)
        object.__setattr__(value, "url", gateway.url(own))  # the class is frozen for users
        return url


driver: ServerDriver = ServerDriver()
