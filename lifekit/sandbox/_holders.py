"""Who has a connection of the sandbox, and the errors that name both sides of a wait."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, cast
from weakref import ref

from lifekit._errors import SandboxBusyError, SandboxEscapedError
from lifekit._stack import Site, caller_frame, suspended_frames
from lifekit.drivers._loans import Loan


class Holder:
    """Who acquired a connection, and uses it."""

    in_transaction: bool = False

    def __init__(self, package: str) -> None:
        self._package = package
        self._site: object = None
        self._task: Callable[[], asyncio.Task[Any] | None] = _nobody

    def acquired(self, frame: FrameType | None = None) -> None:
        """Note who has it from now on."""
        self._site = Site(frame or caller_frame(self._package, "asyncio"))
        self.is_used_here()

    def acquired_before(self, loan: Loan | None) -> None:
        """Note who has had it since before the block."""
        self._site = loan

    def is_used_here(self) -> None:
        """Note that the running task uses it."""
        task = _current_task()
        self._task = ref(task) if task is not None else _nobody

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that acquired it, or began its transaction."""
        return self._task()

    def __str__(self) -> str:
        task = self._task()
        if task is None or isinstance(self._site, Loan):
            return str(self._site or "an unknown line")
        if self._site is None or "/asyncio/" in str(self._site):  # the task runs nothing else
            name = getattr(task.get_coro(), "__qualname__", "unknown")
            return f"an unknown line (task {task.get_name()!r}, which runs {name})"
        return f"{self._site} (task {task.get_name()!r})"

    def holder(self) -> str:
        """Return who has it: the line that acquired it, the task, its coroutine, where that stands."""
        task = self._task()
        if task is None or task.done() or task is _current_task():
            return str(self)
        coroutine = task.get_coro()
        name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
        # The last line that is somebody's own, not where it waits in the end.
        passed = {self._package, "anyio", "lifekit", *sys.stdlib_module_names}
        stands = [
            frame
            for frame in suspended_frames(coroutine)
            if frame.f_globals.get("__name__", "").partition(".")[0] not in passed
        ]
        return f"{self}, which runs {name}{f' and stands at {Site(stands[-1])}' if stands else ''}"


async def lets_go(is_free: Callable[[], bool]) -> None:
    """Let tasks that are about to end do so, for a hundred rounds of the event loop."""
    for _ in range(100):
        if is_free():
            return
        await asyncio.sleep(0)


def escaped_strays(lanes: Iterable[Holder], use: str) -> SandboxEscapedError:
    """Return the error for connections that were out when a block ended; *use* gives one back."""
    lines = [
        f"  a connection{' in a transaction' * lane.in_transaction} acquired at {lane.holder()}"
        for lane in lanes
    ]
    return SandboxEscapedError(
        "when the sandbox ended, this had not been given back:\n"
        + "\n".join(lines)
        + "\nIts code outlived the test. Let the test wait for it, or the application where it starts "
        f"it; and give it back whatever happens: {use}. It was closed."
    )


def _nobody() -> None:
    return None


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def waits_for_this(task: asyncio.Task[Any] | None) -> bool:
    """Return whether *task* can't go on before the running one does."""
    here = _current_task()
    seen: set[object] = set()
    waiting: list[object] = [task]
    while waiting:
        each = waiting.pop()
        if each is None or each in seen:
            continue
        if each is here:
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


def busy(waiting: Holder, holding: Holder, seconds: float | None = None) -> SandboxBusyError:
    """Return the error for a wait that can't end; *seconds* if it is only likely, after so many."""
    return SandboxBusyError(
        "this statement waits for a transaction that can't end before it.\n"
        f"  the statement is on the connection acquired at {waiting},\n"
        f"  the transaction on the one acquired at {holding}.\n"
        + (_SAME if seconds is None else _IDLE.format(seconds))
    )


ALONE = '@pytest.mark.lifekit(isolation="none"), on a database of its own'
_SAME = (
    "The code that asks is what the transaction waits for. In production these are two connections, "
    "and the second does not see what the first has not committed yet. Pass the connection on to what "
    "runs inside its transaction, or commit first. A test that is about two connections at once runs "
    f"without a sandbox: {ALONE}."
)
_IDLE = (
    "Nothing happened in it for {:.3g} s: most likely its code waits for this statement. In production "
    "these are two connections; in the sandbox a transaction has the one real connection to itself. "
    "Pass the connection on to what runs inside its transaction, or end that first. A test that is "
    f"about two connections at once runs without a sandbox: {ALONE}."
)
