"""The options of declarations: what each of them takes, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypedDict, cast, get_args

from lifekit._util.call_sites import caller

from .errors import DeclarationError
from .resource import Resource, Step, Transient
from .worker import OnCrash, Restart, Worker


class Declaration(TypedDict, total=False):
    """What ``@registry.resource(…)`` takes beside handles.

    A step is a method's name, or a function of the value; it may be sync or async.
    """

    after: Iterable[Resource[Any]]
    """Handles that must be open first, and whose values the factory does not get."""
    name: str | None
    """Its name, where the factory's own will not do."""
    start_timeout: float | None
    """Seconds for its opening, all attempts together; None takes the registry's."""
    close_timeout: float | None
    """Seconds for its ``close`` and ``wait_closed`` together; None takes the registry's."""
    retry: int | None
    """How many more attempts to open it where the failure is transient: a server that is not up."""
    transient: type[Exception] | Collection[type[Exception]] | Callable[[Any], object] | None
    """Which failures are transient besides those that lifekit knows: types, or a function of it."""
    check: Step | None
    """Raises, or returns False, unless the open value works."""
    close: Step | None
    """Begins the closing."""
    wait_closed: Step | None
    """Waits until it is closed."""
    terminate: Step | None
    """Cuts the value off when its closing fails or takes too long."""
    required: bool
    """False lets the start go on without it; it is tried again until it opens."""
    renew_every: float | None
    """Seconds after which it, and what is built from it, is built anew; the old one is closed then."""
    sandbox: bool
    """False leaves the value alone in test mode: what tests do to it may last."""


SECONDS = "seconds, 0 or more; math.inf is no limit"
_PERIOD = "seconds, more than 0"
_REQUIRED = "False, where the application serves without it as well, or True"
_SANDBOX = "False, where what tests do to the value may last, or True"
_STEP = "a method's name, or a function of the value"
_TRANSIENT = "exception types, or a function of the error that is not async"


def is_seconds(value: object) -> bool:
    """Return whether *value* is a number of seconds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def refuse_unless(fits: bool, option: str, value: object, wanted: str) -> None:
    """Raise `DeclarationError` where an option does not fit."""
    if not fits:
        raise DeclarationError(f"{caller()}: {option}={value!r} can't be. It takes {wanted}.")


def refuse_bad_options(options: Declaration) -> None:
    """Raise `DeclarationError` where one of a resource's options does not fit."""
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        match option:
            case "renew_every":
                refuse_unless(is_seconds(value) and value != 0, option, value, _PERIOD)
            case "start_timeout" | "close_timeout":
                refuse_unless(is_seconds(value), option, value, SECONDS)
            case "retry":
                counts = isinstance(value, int) and not isinstance(value, bool) and value >= 0
                refuse_unless(counts, option, value, "how many more attempts: 0 or more")
            case "transient":
                refuse_unless(_tells_transient(value), option, value, _TRANSIENT)
            case "name":
                refuse_unless(isinstance(value, str), option, value, "a name")
            case "required":
                refuse_unless(isinstance(value, bool), option, value, _REQUIRED)
            case "sandbox":
                refuse_unless(isinstance(value, bool), option, value, _SANDBOX)
            case "check" | "close" | "wait_closed" | "terminate":
                refuse_unless(isinstance(value, str) or callable(value), option, value, _STEP)
            case _:
                pass
    if "transient" in given and "retry" not in options:
        raise DeclarationError(
            f"{caller()}: transient= says which failures are tried again, and retry= is missing, which "
            "says how often. Add it: retry=3."
        )


def _is_error_type(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def _tells_transient(value: object) -> bool:
    if isinstance(value, type) or not callable(value):
        several = cast("Collection[object]", value) if isinstance(value, Collection) else [value]
        return all(map(_is_error_type, several))
    return not inspect.iscoroutinefunction(value)


def as_transient(value: Any) -> Transient | None:
    """Return the types as a tuple, which stays as it is."""
    if _is_error_type(value):
        return (value,)
    return value if callable(value) or value is None else tuple(value)


CRASHES: tuple[str, ...] = get_args(OnCrash)
_RESTARTS: tuple[str, ...] = get_args(Restart)


def one_of(values: Collection[str]) -> str:
    """Return how a message says which values there are."""
    return " or ".join(f'"{value}"' for value in values)


class WorkerDeclaration(TypedDict, total=False):
    """What ``@registry.worker(…)`` takes beside handles."""

    after: Iterable[Resource[Any]]
    """Handles that must stay open for as long as it runs, and whose values it does not get."""
    name: str | None
    """Its name, where the function's own will not do."""
    every: float | None
    """Seconds between the end of a run and the beginning of the next; the first run comes at once."""
    restart: Restart
    """After which end it is run again: ``"on-failure"``, ``"always"``, ``"never"``."""
    limit: tuple[int, float]
    """How many failures in how many seconds it may have: one more, and it has crashed."""
    on_crash: OnCrash
    """What a crash does: ``"stop"`` the application, only make it ``"unready"``, or ``"ignore"``."""
    drain: float
    """Seconds that it has to return by itself when the application stops; then it is cancelled.

    It has half of the registry's grace at most, so that the rest is left for what it needs.
    """
    close_timeout: float | None
    """Seconds that it has to end after it was cancelled; None takes the registry's."""
    leader: Resource[Any] | None
    """A pool or engine of PostgreSQL, or a client of Redis: one process of all that have the worker, by
    the names of its registry and its own, runs it at a time, and the others wait. See `leadership`."""


def refuse_bad_rules(options: WorkerDeclaration) -> None:
    """Raise `DeclarationError` where one of a worker's options does not fit."""
    for option, value in options.items():
        match option:
            case "every" | "close_timeout" | "leader" if value is None:
                pass
            case "leader":
                kind = type(value)
                is_handle = issubclass(kind, Resource) and not issubclass(kind, Worker)
                refuse_unless(is_handle, option, value, _LEADER)
            case "every" | "drain" | "close_timeout":
                refuse_unless(is_seconds(value), option, value, SECONDS)
            case "restart":
                refuse_unless(value in _RESTARTS, option, value, one_of(_RESTARTS))
            case "on_crash":
                refuse_unless(value in CRASHES, option, value, one_of(CRASHES))
            case "limit":
                refuse_unless(_is_limit(value), option, value, _LIMIT)
            case _:
                pass


_LEADER = "the handle of a PostgreSQL pool or engine, or of a Redis client"
_LIMIT = "a number of failures and one of seconds: limit=(5, 60.0)"


def _is_limit(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    match cast("tuple[object, ...]", value):
        case (int(count), seconds) if not isinstance(count, bool):
            return count >= 0 and is_seconds(seconds)
        case _:
            return False


def refuse_no_handles(
    needs: Iterable[object], after: Any, *, workers: bool = False
) -> tuple[Resource[Any], ...]:
    """Return *after* as a tuple; raise `DeclarationError` where something is no handle to build on."""
    if isinstance(after, Resource):
        raise DeclarationError(f"{caller()}: after takes several handles: after=[{after.name}].")
    others: tuple[Any, ...] = tuple(after or ())
    for need in (*needs, *others):
        if not isinstance(need, Resource):
            raise DeclarationError(
                f"{caller()}: a {type(need).__name__} stands where a handle is expected. What a "
                "resource needs is named by handles, the names that @registry.resource decorates; "
                "a ready-made value can't be one, since it belongs to no lifespan: return it from "
                "a factory instead."
            )
        if isinstance(need, Worker) and not workers:
            raise DeclarationError(
                f"{caller()}: a resource can't need {need.name}, which is a worker "
                f"({need.location}): workers begin when all resources are open. Let both need what "
                "they share, such as a queue."
            )
    return others
