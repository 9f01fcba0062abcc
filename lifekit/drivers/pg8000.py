"""What lifekit knows about pg8000: how its connections lead to a gateway."""

from __future__ import annotations

import inspect
import ssl
from typing import Any

from pg8000 import core  # type: ignore[import-untyped]

from lifekit._core.drivers import Tls

from ._doors import Door, Here, checkout


def _through(init: Any, here: Here) -> Any:
    """Return what connects by way of the gateway of the calling code, where it has one."""
    signature = inspect.signature(init)

    def by_gateway(self: Any, *args: Any, **named: Any) -> None:
        bound = signature.bind(self, *args, **named)
        bound.apply_defaults()
        given = bound.arguments
        host, port = given["host"], given["port"]
        if given["unix_sock"] is not None:
            host, _, port = given["unix_sock"].rpartition("/.s.PGSQL.")
        gateway = here(host, port) if given.get("sock") is None else None
        if gateway is None:
            init(self, *args, **named)
            return
        context = given["ssl_context"]
        context = ssl.create_default_context() if context is True else context
        folder, number = gateway.socket(host, int(port), tls=Tls(context) if context else None)
        by = checkout()
        given.update(unix_sock=f"{folder}/.s.PGSQL.{number}", ssl_context=None)
        init(*bound.args, **bound.kwargs)
        gateway.made(self, _number, by)

    return by_gateway


def _number(connection: Any) -> int | None:
    """Return None: pg8000 does not tell the process of the server's."""
    return None


_core: Any = core
door: Door = Door(_core.CoreConnection, "__init__", _through)
