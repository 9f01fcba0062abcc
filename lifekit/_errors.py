"""All that lifekit raises.

LifekitError
├── DeclarationError             the declarations can't work
├── NotOpenError                 a value is asked for and nothing has opened it
├── WrongLoopError               it is open, in another event loop
├── StartupError                 what failed to open (an ExceptionGroup)
├── ShutdownError                what failed to close (an ExceptionGroup)
├── DeadlineError                one phase of one resource ran out of time (a TimeoutError)
├── OverrideError                an override that can't hold
└── SandboxError
    ├── SandboxEscapedError      something got out of the sandbox
    ├── SandboxBusyError         a wait inside the sandbox can never end
    └── SandboxUnsupportedError  the sandbox can't do that
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, cast

from ._redact import redact

Phase = Literal["open", "check", "close", "wait_closed", "terminate"]


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

    Attributes: ``resource``, its name; ``phase``, one of ``open``, ``check``, ``close``,
    ``wait_closed``, ``terminate``; ``seconds``, the time that it had; ``stack``, the lines where
    its coroutine stood; ``holders``, for a pool, who holds its connections; ``abandoned``, whether
    it also ignored its cancellation, so that its task was left behind.
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
        grace: float | None = None,
        abandoned: bool = False,
    ) -> None:
        self.resource = resource
        self.phase: Phase = phase
        self.seconds = seconds
        self.stack: tuple[str, ...] = tuple(stack)
        self.holders: tuple[str, ...] = tuple(holders)
        self.abandoned = abandoned
        lines = [f"{resource} ({location}): {phase} took longer than {seconds:.3g} s"]
        if grace is not None:
            lines[0] += f", all that was left of the shutdown's grace of {grace:.3g} s"
        if abandoned:
            lines[0] += " and ignored its cancellation: its task was left behind"
        if holders:
            lines += ["  its connections are held by", *(f"    {line}" for line in holders)]
        if stack:
            lines += ["  it stood at", *(f"    {line}" for line in stack)]
        super().__init__("\n".join(lines))


class _FailureGroup(LifekitError, ExceptionGroup[Exception]):
    """What `StartupError` and `ShutdownError` share: failures, each with its resource's name."""

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
    ) -> Self:
        """Build it from (name, code line, error) of each failure."""
        lines = [f"{lifespan} did not start: {_listed(name for name, _, _ in failures)} failed"]
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


def summary(error: BaseException) -> str:
    """Return an error's type and text in one line, with no password in it."""
    text = _text(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(error: BaseException) -> str:
    try:
        return redact(str(error))
    except Exception as broken:  # an error that can't say what it is must not hide that it came
        return f"its text can't be had: {type(broken).__name__}"


def note_once(error: BaseException, note: str) -> None:
    """Add a note to an error that may have it already, or that takes none."""
    if note not in _notes(error):
        with suppress(Exception):
            error.add_note(note)


def _notes(error: BaseException) -> list[str]:
    found: object = getattr(error, "__notes__", None)
    listed = cast("list[object]", found) if isinstance(found, list) else []
    return [each for each in listed if isinstance(each, str)]


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
        notes = [each for each in _notes(error) if each.startswith("lifekit: ")]
        text = "\n  ".join([f"{name} ({location}): {summary(error)}", *notes])
    return "\n".join(f"  {line}" for line in text.splitlines())


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
