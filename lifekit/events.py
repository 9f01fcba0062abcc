"""What happens in a lifespan, as a closed set of events, and their default log lines."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._core.errors import Phase, UnavailableError, summary
from ._core.timeline import Timeline

if TYPE_CHECKING:
    from ._core.lifespan import Lifespan  # which they name
    from ._core.worker import OnCrash, WorkerState  # whose ends they tell

logger: logging.Logger = logging.getLogger("lifekit")


@dataclass(frozen=True, slots=True)
class _Event:
    registry: str
    """The name of the registry whose lifespan it is."""
    lifespan: Lifespan | None = field(default=None, kw_only=True, repr=False, compare=False)
    """The lifespan itself, where several of one registry run."""


@dataclass(frozen=True, slots=True)
class _ResourceEvent(_Event):
    resource: str
    """The resource's name."""


@dataclass(frozen=True, slots=True)
class Opening(_ResourceEvent):
    """All that a resource needs is open: its factory is called now."""


@dataclass(frozen=True, slots=True)
class Retrying(_ResourceEvent):
    """An opening failed with a transient error and is tried again after *delay* seconds."""

    attempt: int
    delay: float
    error: BaseException = field(repr=False)  # its text may hold a password


@dataclass(frozen=True, slots=True)
class Opened(_ResourceEvent):
    """A resource is open and checked, after *seconds*."""

    seconds: float
    description: str


@dataclass(frozen=True, slots=True)
class Unavailable(_ResourceEvent):
    """A resource that is not required did not open, and is tried again after *delay* seconds."""

    error: BaseException = field(repr=False)  # its text may hold a password
    delay: float


@dataclass(frozen=True, slots=True)
class Renewed(_ResourceEvent):
    """A resource, and what is built from it, was built anew in *seconds*: the new values serve."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RenewalFailed(_ResourceEvent):
    """A renewal came to nothing: the old values stay, where there were any."""

    error: BaseException = field(repr=False)  # its text may hold a password


@dataclass(frozen=True, slots=True)
class HeldTooLong(_ResourceEvent):
    """What was renewed *seconds* ago is closed now, though *holders*, which are requests, still go on.

    *resource* names all that was renewed together.
    """

    seconds: float
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blocked(_ResourceEvent):
    """An opening or closing kept the event loop from everybody else for *seconds*.

    *line* is where it stood then, or else where its factory is.
    """

    phase: Phase
    seconds: float
    line: str


@dataclass(frozen=True, slots=True)
class OpenFailed(_ResourceEvent):
    """An opening failed after *seconds*; *error* is None where a rollback cancelled it."""

    seconds: float
    error: BaseException | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Closing(_ResourceEvent):
    """All that needed the resource is closed: its own closing begins."""


@dataclass(frozen=True, slots=True)
class CloseFailed(_ResourceEvent):
    """One phase of a closing failed; the closing goes on with what is left of it."""

    phase: Phase
    error: BaseException = field(repr=False)  # its text may hold a password


@dataclass(frozen=True, slots=True)
class Terminated(_ResourceEvent):
    """What did not open, or not close, in order is cut off."""


@dataclass(frozen=True, slots=True)
class Closed(_ResourceEvent):
    """A closing is over, after *seconds*; *clean* unless some phase of it failed."""

    seconds: float
    clean: bool


@dataclass(frozen=True, slots=True)
class WorkerStarted(_ResourceEvent):
    """Everything is open: a worker begins."""


@dataclass(frozen=True, slots=True)
class Leading(_ResourceEvent):
    """A worker with ``leader=`` leads: no other process runs it from now on."""

    number: int


@dataclass(frozen=True, slots=True)
class LeadershipLost(_ResourceEvent):
    """A worker that leads has lost the lock, and is cancelled; then it waits to lead again."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerFailed(_ResourceEvent):
    """A run of a worker failed; it is run again after *delay* seconds, never where that is None."""

    error: BaseException = field(repr=False)  # its text may hold a password
    delay: float | None


@dataclass(frozen=True, slots=True)
class WorkerEnded(_ResourceEvent):
    """A worker has ended, by itself or since it was told to: *state* is ``ended`` or ``crashed``."""

    state: WorkerState


@dataclass(frozen=True, slots=True)
class Crashed(_ResourceEvent):
    """A worker has failed too often, or a task group of an open resource has died.

    *error* is None where that is known only when the resource closes. *on_crash* is what follows.
    """

    error: BaseException | None = field(repr=False)  # its text may hold a password
    on_crash: OnCrash


@dataclass(frozen=True, slots=True)
class Started(_Event):
    """Everything is open."""

    timeline: Timeline


@dataclass(frozen=True, slots=True)
class StopNoticed(_Event):
    """The application is to stop: *reason* is the signal, or what ``stop()`` was given.

    It comes before the server drains its connections, and never where the lifespan is simply left.
    """

    reason: str
    from_outside: bool
    """Whether the process was told, by a signal; else the application asked for it, or has crashed."""


@dataclass(frozen=True, slots=True)
class Stopping(_Event):
    """The closing begins: of a lifespan that ends, or of what had opened before a failed start."""


@dataclass(frozen=True, slots=True)
class Stopped(_Event):
    """Everything is closed, cleanly or not."""

    timeline: Timeline


Event = (
    Opening
    | Retrying
    | Unavailable
    | Renewed
    | RenewalFailed
    | HeldTooLong
    | Blocked
    | Opened
    | OpenFailed
    | Started
    | StopNoticed
    | Stopping
    | Closing
    | CloseFailed
    | Terminated
    | Closed
    | WorkerStarted
    | Leading
    | LeadershipLost
    | WorkerFailed
    | WorkerEnded
    | Crashed
    | Stopped
)


_FOLLOWS: dict[OnCrash, str] = {
    "stop": "the application is asked to stop",
    "unready": "the application is not ready any more",
    "ignore": "the application goes on without it",
}
_NO_WORD = "a task group or another scope that it holds was cancelled while it was open"


def log(event: Event) -> None:
    """Write an event to the logger ``lifekit``: one line for each resource opened and closed."""
    match event:
        case Opened():
            line = f"{event.resource} opened in {event.seconds:.3f} s: {event.description}"
            logger.info(line)
        case Closed(clean=True):
            logger.info(f"{event.resource} closed in {event.seconds:.3f} s")
        case Retrying():
            cause = summary(event.error)
            logger.warning(f"{event.resource} tried again in {event.delay:.2f} s after {cause}")
        case Unavailable():
            cause = summary(event.error)
            logger.warning(
                f"{event.resource} is unavailable, and tried again in {event.delay:.2f} s: {cause}"
            )
        case Renewed():
            logger.info(f"{event.resource} renewed in {event.seconds:.3f} s")
        case RenewalFailed(error=UnavailableError()):
            cause = summary(event.error)
            logger.warning(f"{event.resource} is not there to be renewed, and opens by itself: {cause}")
        case RenewalFailed():
            logger.error(f"{event.resource} was not renewed, and stays: {summary(event.error)}")
        case HeldTooLong():
            logger.error(
                f"{event.resource}: renewed {event.seconds:.3g} s ago, and closed now although "
                f"requests that began before go on: {', '.join(event.holders)}"
            )
        case OpenFailed(error=None):
            logger.info(f"{event.resource} cancelled after {event.seconds:.3f} s")
        case OpenFailed(error=BaseException() as error):
            logger.error(
                f"{event.resource} failed to open after {event.seconds:.3f} s: {summary(error)}"
            )
        case CloseFailed():
            logger.error(f"{event.resource} failed in {event.phase}: {summary(event.error)}")
        case Blocked():
            # While it starts nobody is served, and a model is loaded.
            level = logging.INFO if event.phase in ("open", "check") else logging.WARNING
            logger.log(
                level,
                f"{event.resource} blocked the event loop for {event.seconds:.2f} s in {event.phase}: "
                f"{event.line}",
            )
        case Terminated():
            logger.warning(f"{event.resource} terminated")
        case WorkerFailed() | Leading() | LeadershipLost() | Crashed():
            _log_work(event)
        case StopNoticed():
            level = logging.INFO if event.from_outside else logging.WARNING
            logger.log(level, f"{event.registry} is asked to stop: {event.reason}")
        case Started() | Stopped():
            logger.info(event.timeline.title)
        case _:
            logger.debug(f"{event.registry}: {event}")


def _log_work(event: WorkerFailed | Leading | LeadershipLost | Crashed) -> None:
    match event:
        case WorkerFailed(delay=delay):
            follows = "not run again" if delay is None else f"run again in {delay:.2f} s"
            logger.error(
                f"{event.resource} failed, and is {follows}: {summary(event.error)}",
                exc_info=event.error,
            )
        case Leading():
            logger.info(f"{event.resource} leads, as number {event.number}")
        case LeadershipLost():
            logger.warning(
                f"{event.resource} leads no more, is cancelled, and waits to lead again: {event.reason}"
            )
        case Crashed():
            cause = _NO_WORD if event.error is None else summary(event.error)
            logger.critical(f"{event.resource} crashed: {cause}; {_FOLLOWS[event.on_crash]}")
