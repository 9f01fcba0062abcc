"""A COPY from a client: the server reads, and heeds nothing but its data and what ends it."""

from __future__ import annotations

from collections.abc import Callable

from .messages import SYNC, Frontend, message
from .real import Exchange

_DATA = frozenset((Frontend.COPY_DATA, Frontend.COPY_DONE, Frontend.COPY_FAIL))


class Copying:
    """Whether one client's data is being read."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        """*send* sends to the server."""
        self._send = send
        self._exchange: Exchange | None = None

    @property
    def is_on(self) -> bool:
        """Whether the server reads."""
        return self._exchange is not None

    def begin(self, exchange: Exchange) -> None:
        """Take note that the server reads."""
        self._exchange = exchange

    def end(self) -> None:
        """Take note that it does not any more."""
        self._exchange = None

    def fail(self) -> None:
        """End it, for its client has gone."""
        assert self._exchange is not None
        self._send(message(Frontend.COPY_FAIL, b"gone\0") + (b"" if self._exchange.simple else SYNC))

    def take(self, kind: int, whole: bytes) -> bool:
        """Send a message of the client's, if it is one for the server; return whether it was a Sync."""
        assert self._exchange is not None
        if kind in _DATA:
            self._send(whole)
            if self._exchange.simple and kind != Frontend.COPY_DATA:
                self._exchange = None
            return False
        if kind != Frontend.SYNC:
            return False
        # The server has ignored the one that came behind what began the COPY.
        self._exchange = None
        self._send(SYNC)
        return True
