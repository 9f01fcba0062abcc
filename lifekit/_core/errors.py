"""All that lifekit raises.

LifekitError
├── DeclarationError             the declarations can't work
├── NotOpenError                 a value is asked for and nothing has opened it
├── WrongLoopError               it is open, in another event loop
├── StartupError                 what failed to open (an ExceptionGroup)
├── ShutdownError                what failed to close (an ExceptionGroup)
├── CrashError                   what died while the application ran (an ExceptionGroup)
├── UnavailableError             what is not required is not open now
├── DeadlineError                one phase of one resource ran out of time (a TimeoutError)
├── OverrideError                an override that can't hold
└── SandboxError
    ├── SandboxEscapedError      something got out of the sandbox
    ├── SandboxBusyError         a wait inside the sandbox can never end
    └── SandboxUnsupportedError  the sandbox can't do that
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, cast

from lifekit._util.redact import redact

Phase = Literal["open", "check", "run", "close", "wait_closed", "terminate"]
Failure = tuple[str, str, Exception]
"""A resource's name, its code line, what it failed with."""


class LifekitError(Exception):
    """The base of everything that lifekit raises."""

    __module__ = "lifekit"  # a traceback names what is to be imported

    def __init_subclass__(cls, **options: Any) -> None:
        """Let lifekit's own say so as well."""
        super().__init_subclass__(**options)
        if cls.__module__ == __name__:
            cls.__module__ = "lifekit"

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew from its text and its attributes, whatever its own __init__ asks for.
        return _made_anew, (type(self), self.args, self.__dict__)


class DeclarationError(LifekitError):
    """The declarations can't work: a cycle, a duplicate, a foreign handle, no factory."""


class NotOpenError(LifekitError):
    """A value is asked for and no lifespan has opened it.

    Attributes: ``resource``, its name.
    """

    def __init__(self, message: str, *, resource: str) -> None:
        super().__init__(message)
        self.resource = resource


class WrongLoopError(LifekitError):
    """A value is asked for in another event loop than the one it is open in.

    Attributes: ``resource``, its name; ``opened_at``, the code line that made the lifespan.
    """

    def __init__(self, message: str, *, resource: str, opened_at: str) -> None:
        super().__init__(message)
        self.resource = resource
        self.opened_at = opened_at


class DeadlineError(LifekitError, TimeoutError):
    """One phase of one resource ran out of time.

    Attributes: ``resource``, its name; ``phase``, one of ``open``, ``check``, ``run`` (of a
    worker), ``close``, ``wait_closed``, ``terminate``; ``seconds``, the time that it had; ``stack``,
    the lines where its coroutine stood; ``opening``, what it was to open or to reach, where that is
    known; ``holders``, for a pool, who holds its connections; ``blocked``, the seconds of its own for
    which nothing else could run, and nothing end it; ``abandoned``, whether it also ignored its
    cancellation, so that its task was left behind.
    """

    def __init__(
        self,
        *,
        resource: str,
        location: str,
        phase: Phase,
        seconds: float,
        stack: Sequence[str] = (),
        holders: Sequence[str] = (),
        opening: str = "",
        grace: float | None = None,
        blocked: float = 0.0,
        abandoned: bool = False,
    ) -> None:
        self.resource = resource
        self.phase: Phase = phase
        self.seconds = seconds
        self.stack: tuple[str, ...] = tuple(stack)
        self.holders: tuple[str, ...] = tuple(holders)
        self.opening = opening
        self.blocked = blocked
        self.abandoned = abandoned
        lines = [f"{resource} ({location}): {phase} took longer than {seconds:.3g} s"]
        if grace is not None:
            lines[0] += f", all that was left of the shutdown's grace of {grace:.3g} s"
        if abandoned:
            lines[0] += " and ignored its cancellation: its task was left behind"
        if blocked:
            lines[0] += f", and blocked the event loop for {blocked:.3g} s"
            lines.append(
                "  while it blocks nothing else runs, and no deadline can end it: let it wait in a "
                "thread, `await asyncio.to_thread(…)`"
            )
        if opening:
            lines.append(f"  opening {opening}")
        if holders:
            lines += ["  its connections are held by", *(f"    {line}" for line in holders)]
        if stack:
            lines += ["  it stood at", *(f"    {line}" for line in stack)]
        super().__init__("\n".join(lines))


class _FailureGroup(LifekitError, ExceptionGroup[Exception]):
    """What the groups of failures share: each failure has its resource's name."""

    failures: tuple[tuple[str, BaseException], ...] = ()

    def derive(self, excs: Sequence[Exception], /) -> Self:  # type: ignore[override]
        part = type(self)(self.message, excs)
        part.__dict__.update(self.__dict__)
        if "__notes__" in part.__dict__:
            part.__notes__ = [*part.__notes__]
        return part


class StartupError(_FailureGroup):
    """The lifespan did not start: every cause, the first failure first.

    Attributes: ``failures``, pairs of a resource's name and what it failed with; ``opened``, the
    names of what had opened (and was closed again); ``cut_off``, the names of what was still opening;
    ``not_begun``, the names of what never began; ``rollback``, the `ShutdownError` of closings that
    failed on the way back, or None.
    """

    opened: tuple[str, ...] = ()
    cut_off: tuple[str, ...] = ()
    not_begun: tuple[str, ...] = ()
    rollback: ShutdownError | None = None

    @classmethod
    def of(
        cls,
        lifespan: str,
        failures: Sequence[tuple[str, str, Exception]],
        *,
        opened: Sequence[str] = (),
        cut_off: Sequence[str] = (),
        not_begun: Sequence[str] = (),
        rollback: ShutdownError | None = None,
        renewing: str = "",
    ) -> Self:
        """Build it from (name, code line, error) of each failure."""
        names = _listed(dict.fromkeys(name for name, _, _ in failures)) if failures else "nothing"
        what = f"{lifespan} did not start"
        if renewing:
            what = f"{renewing} of {lifespan} was not renewed, and the old one stays"
        lines = [f"{what}: {names} failed"]
        lines += [_line(*failure) for failure in failures]
        if opened:
            lines.append(f"  opened, and closed again: {', '.join(opened)}")
        if cut_off:
            lines.append(f"  cancelled while it opened: {', '.join(cut_off)}")
        if not_begun:
            lines.append(f"  never began: {', '.join(not_begun)}")
        causes = [error for _, _, error in failures]
        if rollback is not None:
            causes.append(rollback)
        group = cls("\n".join(lines), causes)
        group.failures = tuple((name, error) for name, _, error in failures)
        group.opened = tuple(opened)
        group.cut_off = tuple(cut_off)
        group.not_begun = tuple(not_begun)
        group.rollback = rollback
        return group


class ShutdownError(_FailureGroup):
    """Closings that failed; everything else was closed all the same.

    Attributes: ``failures``, pairs of a resource's name and what its closing failed with.
    """

    @classmethod
    def of(cls, lifespan: str, failures: Sequence[tuple[str, str, Exception]]) -> Self:
        """Build it from (name, code line, error) of each failure."""
        names = _listed(dict.fromkeys(name for name, _, _ in failures))
        lines = [f"{lifespan} did not close cleanly: {names} failed"]
        lines += [_line(*failure) for failure in failures]
        group = cls("\n".join(lines), [error for _, _, error in failures])
        group.failures = tuple((name, error) for name, _, error in failures)
        return group


class CrashError(_FailureGroup):
    """Workers and resources that died while the application ran.

    Attributes: ``failures``, pairs of a name and what it died of; ``shutdown``, the `ShutdownError` of
    closings that failed afterwards, or None.
    """

    shutdown: ShutdownError | None = None

    @classmethod
    def of(
        cls,
        lifespan: str,
        failures: Sequence[tuple[str, str, Exception]],
        shutdown: ShutdownError | None = None,
    ) -> Self:
        """Build it from (name, code line, error) of each failure."""
        names = _listed(dict.fromkeys(name for name, _, _ in failures))
        lines = [f"{lifespan} was stopped: {names} crashed while it ran"]
        lines += [_line(*failure) for failure in failures]
        causes = [error for _, _, error in failures]
        if shutdown is not None:
            causes.append(shutdown)
        group = cls("\n".join(lines), causes)
        group.failures = tuple((name, error) for name, _, error in failures)
        group.shutdown = shutdown
        return group


class UnavailableError(LifekitError):
    """A resource that is not required is not open now, and is tried again.

    Starlette and FastAPI answer a request that it ends with 503 and Retry-After, unless the application
    has a handler for it.

    Attributes: ``resource``, the name of what was asked for; ``error``, what the last attempt to open
    it, or what it needs, failed with; ``retry_after``, the seconds until the next one.
    """

    def __init__(self, message: str, *, resource: str, error: Exception, retry_after: float) -> None:
        super().__init__(message)
        self.resource = resource
        self.error = error
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_anew, (UnavailableError, self.args, self.__dict__)


class OverrideError(LifekitError):
    """An override that can't hold: unknown handle, already open, value of the wrong type."""


class SandboxError(LifekitError):
    """The base of what a sandbox raises."""


class SandboxEscapedError(SandboxError):
    """Something got out of the sandbox."""


class SandboxBusyError(SandboxError):
    """A wait inside the sandbox can never end."""


class SandboxUnsupportedError(SandboxError):
    """The sandbox can't do that; the message says which isolation can."""


def is_a(error: BaseException, kind: type[BaseException]) -> bool:
    """Return whether *error* is of *kind*, without asking the error itself for its class."""
    return issubclass(type(error), kind)


def without(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """Return *error* but for what in it is of *kind*: itself, a plain group of the rest, or None.

    A group's own class, which may be broken, is asked nothing.
    """
    if not is_a(error, BaseExceptionGroup):
        return None if is_a(error, kind) else error
    left, seen = [error], set[int]()
    rest: list[BaseException] = []
    taken_out = False
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if issubclass(type(each), BaseExceptionGroup):
            left += reversed(members_of(each))
        elif issubclass(type(each), kind):
            taken_out = True
        else:
            rest.append(each)
    if not taken_out or not rest:
        return error if rest else None
    return BaseExceptionGroup(_message_of(error), rest).with_traceback(error.__traceback__)


members_of: Any = vars(BaseExceptionGroup)["exceptions"].__get__
_message_of: Any = vars(BaseExceptionGroup)["message"].__get__


def summary(error: BaseException) -> str:
    """Return an error's type, its text and what is behind it in one line, with no password in it."""
    cause = _telling_cause(error)
    return f"{_with_parts(error)}, caused by {_with_parts(cause)}" if cause else _with_parts(error)


def _with_parts(error: BaseException) -> str:
    parts = _parts(error)
    return f"{_head(error)}: {'; '.join(parts)}" if parts else _head(error)


def _parts(error: BaseException) -> list[str]:
    """Return what a group holds, without the groups in it: the first of them, and how many more."""
    left, heads, seen = [error], dict[str, None](), 0
    while left and seen < _MOST:
        each = left.pop()
        seen += 1
        if issubclass(type(each), BaseExceptionGroup):
            left += reversed(_EXCEPTIONS.__get__(each))
        elif each is not error:
            heads[_head(each)] = None
    first = [*heads][:_FIRST]
    return [*first, f"and {len(heads) - _FIRST} more"] if len(heads) > _FIRST else first


def _telling_cause(error: BaseException) -> BaseException | None:
    """Return its cause, where that says more than the error itself."""
    cause: BaseException | None = _CAUSE.__get__(error)
    if cause is None or issubclass(type(error), LifekitError):  # which says it itself
        return None
    new = set(_WORDS.findall(_text(cause))) - set(_WORDS.findall(_text(error)))
    return cause if new or not _text(cause) else None


def _head(error: BaseException) -> str:
    text = _text(error).strip().partition("\n")[0]
    text = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"
    return f"{name_of(error)}: {text}" if text else name_of(error)


def _text(error: BaseException) -> str:
    return redact(text_of(error)[:_LONGEST_TEXT])


# -- what an error shows, whatever its class makes of it ---------------------------------------------

_MOST, _FIRST, _LONGEST_LINE, _LONGEST_TEXT = 20_000, 3, 1000, 20_000
_WORDS = re.compile(r"\w+")
_CAUSE: Any = vars(BaseException)["__cause__"]
_EXCEPTIONS: Any = vars(BaseExceptionGroup)["exceptions"]
_NAME: Any = vars(type)["__name__"]


def text_of(error: object, shows: Callable[[Any], str] = str) -> str:
    """Return `str(error)`, whatever that raises."""
    # KeyboardInterrupt and its like as well: the loop's own handler raises none in here.
    try:
        return "".join([shows(error)])  # `__str__` may return a subclass
    except BaseException as broken:  # an error that can't say what it is must not hide that it came
        return f"message unavailable: {name_of(broken)}"


def name_of(error: BaseException) -> str:
    """Return the name of an error's class."""
    name: str = _NAME.__get__(type(error))
    return name


def notes_of(error: BaseException) -> list[str]:
    """Return an error's notes, as they are shown."""
    try:
        notes: object = getattr(error, "__notes__", None)
    except BaseException:  # a property that raises
        return []
    if isinstance(notes, list | tuple):
        return [text_of(note) for note in cast("Sequence[object]", notes)]
    return [] if notes is None else [text_of(notes, repr)]


def note_once(error: BaseException, note: str) -> None:
    """Add a note to an error that may have it already, or that takes none."""
    if note not in notes_of(error):
        with suppress(BaseException):
            error.add_note(note)


def _made_anew(
    kind: type[LifekitError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> LifekitError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def _line(name: str, location: str, error: Exception) -> str:
    text = _text(error)
    if not text.startswith(f"{name} ({location})"):  # else it is one of lifekit's own
        cause = _telling_cause(error)
        behind = [f"  {part}" for part in _parts(error)]
        behind += [f"caused by {_with_parts(cause)}"] if cause is not None else []
        notes = [redact(each) for each in notes_of(error) if each.startswith("lifekit: ")]
        text = "\n  ".join([f"{name} ({location}): {_head(error)}", *behind, *notes])
    return "\n".join(f"  {line}" for line in text.splitlines())


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
