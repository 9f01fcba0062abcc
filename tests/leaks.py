"""What a test counts before and after, to see that nothing was left running."""

from __future__ import annotations

import asyncio
import sys


def tasks_alive() -> int:
    """Return how many tasks live in the running event loop."""
    if asyncio._get_running_loop() is not None:
        return len(asyncio.all_tasks())
    return sys.modules["trio"].lowlevel.current_statistics().tasks_living  # type: ignore[no-any-return]
