"""Which task waits for which, as far as that can be seen."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

from lifekit._util.call_sites import suspended_frames


def waits_for(task: asyncio.Task[Any] | None, other: asyncio.Task[Any] | None) -> bool:
    """Return whether *task* can't go on before *other* does."""
    if other is None:
        return False
    seen: set[object] = set()
    waiting: list[object] = [task]
    while waiting:
        each = waiting.pop()
        if each is None or each in seen:
            continue
        if each is other:
            return True
        seen.add(each)
        waiting += _awaited(each)
    return False


def _awaited(future: object) -> Iterator[object]:
    yield getattr(future, "_fut_waiter", None)
    yield from getattr(future, "_children", ())  # gather's
    if isinstance(future, asyncio.Task):
        coroutine = cast(object, future.get_coro())
        for frame in suspended_frames(coroutine):
            group = frame.f_locals.get("self")
            if type(group).__name__ == "TaskGroup":  # asyncio's and AnyIO's
                yield from getattr(group, "_tasks", ())
