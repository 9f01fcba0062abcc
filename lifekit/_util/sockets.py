"""Whether a connection is still there, of which its loop may not have heard yet."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any


def cuts_of(socket: Any) -> Callable[[], bool]:
    """Return what tells whether there is something to read of an idle connection: that it was closed.

    Args:
        socket: A socket, or the number of its file.
    """
    if not hasattr(select, "poll"):  # on Windows
        return lambda: bool(select.select([socket], [], [], 0)[0])
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return lambda: bool(poll.poll(0))


def is_cut(socket: Any) -> bool:
    """Return whether the server has closed an idle connection."""
    return cuts_of(socket)()
