"""Who took a connection from a pool and has not given it back: code lines and tasks."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from lifekit._core.block import Block, current_block
from lifekit._core.drivers import Driver, Gateway, Sandbox
from lifekit._core.errors import SandboxBusyError, note_once
from lifekit._util.call_sites import Site, caller_frame, code_line, suspended_frames

T = TypeVar("T")
_SHOWN = 10


class Checkout:
    """The line, and the task, that asked for a connection: as text only when it is asked for."""

    __slots__ = ("_code", "_line", "_module", "_name", "_task", "_text", "block")

    def __init__(self, frame: FrameType, task: asyncio.Task[Any] | None) -> None:
        self._code, self._line = frame.f_code, frame.f_lineno
        self._module = frame.f_globals.get("__name__", "")
        self._text: str | None = None
        self._task = ref(task) if task is not None else None
        self._name = task.get_name() if task is not None else None
        self.block: Block | None = current_block.get()
        """The sandbox in which the asking code was started."""

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that asked for it."""
        return self._task() if self._task is not None else None

    @property
    def is_over(self) -> bool:
        """Whether the task that asked for it has ended: it gives it back just now, or never."""
        return self._task is not None and ((task := self._task()) is None or task.done())

    @property
    def line(self) -> str:
        """``file:line in function``."""
        # In a task that runs nothing but the acquire, the asking line was not on the stack.
        if self._module.partition(".")[0] in {"asyncio", "lifekit"}:
            return "an unknown line"
        if self._text is None:  # a thousand waits may be cancelled at once, and each name it
            where = code_line(self._code.co_filename, self._line)
            self._text = f"{where} in {self._code.co_qualname}"
        return self._text

    def __str__(self) -> str:
        return f"{self.line} (task {self._name!r})" if self._name is not None else self.line

    def in_full(self, package: str) -> str:
        """Return the line, the task, what it runs, and where that stands outside of *package*."""
        task = self.task
        if task is None or task.done() or task is current_task():
            return str(self)
        coroutine = task.get_coro()
        name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
        # The last line that is somebody's own, not where it waits in the end.
        passed = {package, "anyio", "lifekit", *sys.stdlib_module_names}
        stands = [
            frame
            for frame in suspended_frames(coroutine)
            if frame.f_globals.get("__name__", "").partition(".")[0] not in passed
        ]
        return f"{self}, which runs {name}{f' and stands at {Site(stands[-1])}' if stands else ''}"


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task, None where no loop of asyncio's runs."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class Checkouts:
    """The sites of the connections that *package* has handed out."""

    def __init__(self, package: str) -> None:
        self.package: str = package
        self._checkouts: WeakKeyDictionary[object, Checkout] = WeakKeyDictionary()

    def here(self) -> Checkout:
        """Return the line outside the package, and the task, that now ask for a connection."""
        # Where no loop runs, what acquire() returned is awaited later.
        return Checkout(caller_frame(self.package), current_task())

    def note(self, key: object, checkout: Checkout) -> None:
        """Remember where the connection *key* was acquired; it is held weakly."""
        self._checkouts[key] = checkout

    def of(self, key: object) -> Checkout | None:
        """Return where the connection *key* was acquired."""
        return self._checkouts.get(key)

    def lines(self, out: Iterable[object]) -> list[str]:
        """Return a line for each key in *out*: those that have not been given back."""
        return sorted(str(self.of(key) or "an unknown line") for key in out)

    def refuse_hopeless(self, out: Sequence[object], most: int) -> None:
        """Raise where the running task asks for one more connection, and has all of *most* itself."""
        here = current_task()
        if len(out) < most or here is None:
            return
        known = [self.of(key) for key in out]
        if all(each is not None and each.task is here for each in known):
            lines = "".join(f"  acquired at {each}\n" for each in known)
            raise SandboxBusyError(
                f"this waits forever, in production as well: the pool's {len(out)} connections are all "
                f"held by the task that asks for one more.\n{lines}Pass a connection on instead of "
                "acquiring another, or let the pool have more."
            )

    def note_holders(self, error: BaseException, out: Sequence[object]) -> None:
        """Let *error*, which ends a wait for a connection, name who has them all."""
        lines = self.lines(out[:_SHOWN])
        if len(out) > _SHOWN:
            lines.append(f"and {len(out) - _SHOWN} more")
        note = f"lifekit: its {len(out)} connections are held by"
        note_once(error, "\n".join([note, *(f"  {line}" for line in lines)]))


class Pooled(Driver[T]):
    """A driver of values that hand out connections to PostgreSQL."""

    checkouts: Checkouts
    use: str
    """How a connection is given back whatever happens."""

    def out(self, value: T) -> Sequence[Any]:
        """Return the connections that are out."""
        raise NotImplementedError

    def number(self, connection: Any) -> int | None:
        """Return the process of the server's that it says it is connected to, where it says so."""
        raise NotImplementedError

    async def forget_schema(self, value: T) -> None:
        """Forget what its connections know of a schema, which a sandbox has undone."""

    def restore(self, value: T) -> None:
        """Undo `redirect`, of a value that may outlive its lifespan."""

    def is_in_transaction(self, connection: Any) -> bool:
        """Return whether a transaction is open on it."""
        raise NotImplementedError

    def rest(self, value: T) -> Awaitable[object] | None:
        """End the transactions that its driver has begun by itself, as a block ends."""

    def take_back(self, value: T, connection: Any) -> Awaitable[object] | None:
        """Let *value* know that a connection which is out is closed: it is cut off already."""
        raise NotImplementedError

    def holders(self, value: T) -> Sequence[str]:
        """Return where each connection that is out was acquired."""
        return self.checkouts.lines(self.out(value))


class Connected(Pooled[T]):
    """A driver of single connections, which came through their package's door."""

    use = "a resource of its own"

    def is_closed(self, value: T) -> bool:
        """Return whether it is closed."""
        raise NotImplementedError

    def out(self, value: T) -> Sequence[Any]:
        """Return the connection."""
        return () if self.is_closed(value) else (value,)

    def holders(self, value: T) -> Sequence[str]:
        """Return nobody: it is never taken from anywhere."""
        return ()

    def redirect(self, value: T, gateway: Gateway) -> Sandbox | None:
        """See to it that it is what blocks undo."""
        return pool_sandbox(gateway, self, value)

    def take_back(self, value: T, connection: Any) -> None:
        """Do nothing: there is nobody who would have to know."""


def pool_sandbox(gateway: Any, driver: Pooled[T], value: T) -> Sandbox:
    """Return what looks after the connections of a value in blocks."""
    made: Sandbox = gateway.pool(driver, value)
    return made


def sqlite_sandbox(gateway: Any, driver: Driver[T], value: T) -> Sandbox:
    """Return what lets a value work on private copies of SQLite's databases in blocks."""
    made: Sandbox = gateway.sqlite(driver, value)
    return made


def mix_in(noting: Any, pool: Any) -> None:
    """Let *pool*, an open one, do what *noting* adds to its class: note who acquires."""
    if not isinstance(pool, noting):
        with suppress(Exception):  # a subclass whose layout or metaclass forbids it goes unnoted
            pool.__class__ = mixed(noting, pool.__class__)


@functools.cache
def mixed(noting: Any, kind: Any) -> type:
    """Return a class that passes for *kind*, and does what *noting* adds to it."""
    return type(kind.__name__, (noting, kind), {"__slots__": (), **named_like(kind)})


def named_like(kind: Any) -> dict[str, Any]:
    """Return the attributes by which a class made of *kind* says that it is the same."""
    names = ("__doc__", "__module__", "__qualname__")
    return {"_made_by_lifekit": True, **{name: getattr(kind, name) for name in names}}


def called_like(kind: Any, derived: Any) -> Any:
    """Give *derived* the names of *kind*, for which it is to pass."""
    derived.__name__ = kind.__name__
    for name, value in named_like(kind).items():
        setattr(derived, name, value)
    return derived
