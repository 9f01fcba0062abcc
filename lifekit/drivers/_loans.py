"""Who took a connection from a pool and has not given it back: code lines and tasks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from contextlib import suppress
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from lifekit._stack import caller_frame, code_line

Site = tuple[CodeType, int, str, str | None]
"""A code object, a line in it, its module, and a task's name: text is made only when asked for."""


class Loans:
    """The sites of the connections that *package* has handed out."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._sites: WeakKeyDictionary[object, Site] = WeakKeyDictionary()

    def here(self) -> Site:
        """Return the line outside the package, and the task, that now ask for a connection."""
        frame = caller_frame(self._package)
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs: what acquire() returned is awaited later
            task = None
        name = task.get_name() if task is not None else None
        return frame.f_code, frame.f_lineno, frame.f_globals.get("__name__", ""), name

    def note(self, key: object, site: Site) -> None:
        """Remember where the connection *key* was acquired; it is held weakly."""
        self._sites[key] = site

    def lines(self, out: Iterable[object]) -> list[str]:
        """Return a line for each key in *out*: those that have not been given back."""
        return sorted(_text(self._sites.get(key)) for key in out)


def _text(site: Site | None) -> str:
    if site is None:
        return "an unknown line"
    code, line, module, task = site
    # In a task that runs nothing but the acquire, the asking line was not on the stack.
    lost = module.partition(".")[0] in {"asyncio", "lifekit"}
    where = "an unknown line" if lost else f"{code_line(code.co_filename, line)} in {code.co_qualname}"
    return f"{where} (task {task!r})" if task is not None else where


def mix_in(noting: Any, pool: Any) -> None:
    """Let *pool*, an open one, do what *noting* adds to its class: note who acquires."""
    if not isinstance(pool, noting):
        with suppress(Exception):  # a subclass whose layout or metaclass forbids it goes unnoted
            pool.__class__ = _mixed(noting, pool.__class__)


@functools.cache
def _mixed(noting: Any, kind: Any) -> type:
    return type(kind.__name__, (noting, kind), {"__slots__": (), "__doc__": kind.__doc__})
