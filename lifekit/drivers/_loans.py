"""Who took a connection from a pool and has not given it back: code lines and tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import CodeType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from lifekit._stack import caller_frame, code_line


class Site(NamedTuple):
    """Where a connection was acquired: cheap to note, turned into text only when asked for."""

    code: CodeType | None
    line: int
    task: str | None

    def __str__(self) -> str:
        where = "an unknown line"
        if self.code is not None:
            where = f"{code_line(self.code.co_filename, self.line)} in {self.code.co_qualname}"
        return where if self.task is None else f"{where} (task {self.task!r})"


class Loans:
    """The sites of the connections that *package* has handed out."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._sites: WeakKeyDictionary[object, Site] = WeakKeyDictionary()

    def here(self) -> Site:
        """Return the line outside the package, and the task, that now ask for a connection."""
        frame = caller_frame(self._package)
        # In a task that runs nothing but the acquire, the asking line is not on the stack.
        lost = frame.f_globals.get("__name__", "").partition(".")[0] in {"asyncio", "lifekit"}
        task = asyncio.current_task() if asyncio._get_running_loop() else None
        name = task.get_name() if task is not None else None
        return Site(None if lost else frame.f_code, frame.f_lineno, name)

    def note(self, key: object, site: Site) -> None:
        """Remember where what *key* stands for was acquired; the key is held weakly."""
        self._sites[key] = site

    def lines(self, out: Iterable[object]) -> list[str]:
        """Return a line for each key in *out*: those that have not been given back."""
        unknown = Site(None, 0, None)
        return sorted(str(self._sites.get(key, unknown)) for key in out)
