"""Where code stands: the line that declared a thing, the lines where a coroutine waits."""

from __future__ import annotations

import functools
import gc
import inspect
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .redact import redact

_PACKAGE = __name__.partition(".")[0]


def code_line(filename: str, line: int) -> str:
    """Return ``file:line``, the file relative to the working directory where it is inside it."""
    try:
        relative = os.path.relpath(filename)
    except ValueError:  # another drive
        relative = filename
    return f"{filename if relative.startswith('..') else relative}:{line}"


def definition(factory: Callable[..., object]) -> str:
    """Return the code line on which *factory* is defined, else the one that declares it."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    code = getattr(inspect.unwrap(factory), "__code__", None)
    return code_line(code.co_filename, code.co_firstlineno) if code else caller()


def caller(*passing: str) -> str:
    """Return the nearest calling code line outside lifekit and the packages named in *passing*."""
    return frame_line(caller_frame(*passing))


def caller_frame(*passing: str) -> FrameType:
    """Return the frame of the nearest caller outside lifekit and the packages in *passing*."""
    frame = first = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    inside = {_PACKAGE, "contextlib", *passing}
    while frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        if frame.f_back is None:
            return first
        frame = frame.f_back
    return frame


def frame_line(frame: FrameType) -> str:
    """Return where *frame* stands as ``file:line in function``."""
    return str(Site(frame))


class Site:
    """Where a frame stood: ``file:line in function``, as text only when it is asked for."""

    __slots__ = ("_code", "_line")

    def __init__(self, frame: FrameType) -> None:
        self._code, self._line = frame.f_code, frame.f_lineno

    def __str__(self) -> str:
        return f"{code_line(self._code.co_filename, self._line)} in {self._code.co_qualname}"


def waiting_at(coroutine: object) -> tuple[str, ...]:
    """Return the lines where a suspended coroutine stands, outermost first, lifekit's left out."""
    lines: list[str] = []
    for frame in suspended_frames(coroutine):
        if frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
            continue
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        lines.append(f"{frame_line(frame)}: {redact(source)}" if source else frame_line(frame))
    return tuple(lines)


def suspended_frames(awaitable: object) -> Iterator[FrameType]:
    """Yield the frames in which a suspended coroutine stands, outermost first."""
    # Each kind of suspended thing names its own frame and what it waits for.
    while awaitable is not None:
        for kind, frame, inner in _SUSPENDED:
            if kind(awaitable):
                if (standing := getattr(awaitable, frame)) is not None:
                    yield standing
                awaitable = getattr(awaitable, inner)
                break
        else:
            awaitable = _wrapped_by(awaitable)


def held_by(*suspended: object) -> Iterator[object]:
    """Yield what suspended generators hold, in their variables or between enter and exit.

    What `contextlib` makes of a generator is looked into as well.
    """
    left = [*suspended]
    while left:
        each: Any = left.pop()
        generator = getattr(each, "gen", each)
        if inspect.isasyncgen(generator) or inspect.isgenerator(generator):
            for held in gc.get_referents(generator):
                left.append(getattr(held, "__self__", held) if inspect.ismethod(held) else held)
                yield left[-1]


def _wrapped_by(awaitable: object) -> object:
    # `agen.__anext__()` and `coro.__await__()` hide what they drive from Python, not from gc.
    if type(awaitable).__name__ in {
        "async_generator_asend",
        "async_generator_athrow",
        "coroutine_wrapper",
    }:
        for referent in gc.get_referents(awaitable):
            if any(kind(referent) for kind, _, _ in _SUSPENDED):
                return referent
    return None


_SUSPENDED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (inspect.iscoroutine, "cr_frame", "cr_await"),
    (inspect.isgenerator, "gi_frame", "gi_yieldfrom"),
    (inspect.isasyncgen, "ag_frame", "ag_await"),
)
