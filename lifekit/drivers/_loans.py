"""Who took a connection from a pool and has not given it back: code lines and tasks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from lifekit._stack import caller_frame, code_line


class Loan:
    """The line, and the task, that asked for a connection: as text only when it is asked for."""

    __slots__ = ("_code", "_line", "_module", "task")

    def __init__(self, frame: FrameType, task: str | None) -> None:
        self._code, self._line = frame.f_code, frame.f_lineno
        self._module = frame.f_globals.get("__name__", "")
        self.task: str | None = task

    @property
    def line(self) -> str:
        """``file:line in function``."""
        # In a task that runs nothing but the acquire, the asking line was not on the stack.
        if self._module.partition(".")[0] in {"asyncio", "lifekit"}:
            return "an unknown line"
        return f"{code_line(self._code.co_filename, self._line)} in {self._code.co_qualname}"

    def __str__(self) -> str:
        return f"{self.line} (task {self.task!r})" if self.task is not None else self.line


class Loans:
    """The sites of the connections that *package* has handed out."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._loans: WeakKeyDictionary[object, Loan] = WeakKeyDictionary()

    def here(self) -> Loan:
        """Return the line outside the package, and the task, that now ask for a connection."""
        frame = caller_frame(self._package)
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs: what acquire() returned is awaited later
            task = None
        return Loan(frame, task.get_name() if task is not None else None)

    def note(self, key: object, loan: Loan) -> None:
        """Remember where the connection *key* was acquired; it is held weakly."""
        self._loans[key] = loan

    def of(self, key: object) -> Loan | None:
        """Return where the connection *key* was acquired."""
        return self._loans.get(key)

    def lines(self, out: Iterable[object]) -> list[str]:
        """Return a line for each key in *out*: those that have not been given back."""
        return sorted(str(self.of(key) or "an unknown line") for key in out)


def mix_in(noting: Any, pool: Any) -> None:
    """Let *pool*, an open one, do what *noting* adds to its class: note who acquires."""
    if not isinstance(pool, noting):
        with suppress(Exception):  # a subclass whose layout or metaclass forbids it goes unnoted
            pool.__class__ = _mixed(noting, pool.__class__)


@functools.cache
def _mixed(noting: Any, kind: Any) -> type:
    return type(kind.__name__, (noting, kind), {"__slots__": (), **named_like(kind)})


def named_like(kind: Any) -> dict[str, Any]:
    """Return the attributes by which a class made of *kind* says that it is the same."""
    names = ("__doc__", "__module__", "__qualname__")
    return {"_made_by_lifekit": True, **{name: getattr(kind, name) for name in names}}
