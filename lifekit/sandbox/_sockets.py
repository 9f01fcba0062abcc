"""Whether a connection is still there, of which its loop may not have heard yet."""

from __future__ import annotations

import select
from typing import Any


def is_cut(socket: Any) -> bool:
    """Return whether there is something to read of an idle connection: that the server closed it.

    Args:
        socket: A socket, or the number of its file.
    """
    if not hasattr(select, "poll"):  # on Windows
        return bool(select.select([socket], [], [], 0)[0])
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))
