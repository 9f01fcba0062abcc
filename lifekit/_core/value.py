"""How a factory's result becomes an open value, and how that value is closed.

What a declaration says wins, then the driver of the value's type, then the protocols that the
value itself has. A generator and an entered context manager carry their own closing. What an async
function returns is open already, and what a resource has from another one is closed by that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import subprocess
import threading
import warnings
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Sequence,
)
from functools import partial
from pathlib import PurePath
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from lifekit._util.redact import redact

from . import drivers
from .errors import DeclarationError, LifekitError, Phase, note_once, summary
from .factory import signature_of
from .resource import Resource, Step

Call = Callable[[], object]
MADE_BY_CONTEXTLIB = (contextlib.AsyncContextDecorator, contextlib.ContextDecorator)
OTHER_CLOSINGS = ("dispose", "shutdown", "stop", "disconnect", "cleanup")
"""What packages call their closing where it is none of the usual names; the first one wins."""
SECONDS = {"grace", "grace_period", "seconds", "timeout"}
"""Parameters by which such a method is given the seconds that it may take."""


class Live:
    """One value on its way from its factory to its closing. Opened, checked, closed once each."""

    __slots__ = (
        "_gateway",
        "driver",
        "entered",
        "flaw",
        "is_made",
        "is_open",
        "resource",
        "sandbox",
        "steps",
        "terminate",
        "value",
    )

    def __init__(self, resource: Resource[Any]) -> None:
        self.resource = resource
        self.value: Any = None
        self.driver: drivers.Driver[Any] | None = None
        self.sandbox: drivers.Sandbox | None = None
        self._gateway: drivers.Isolation | None = None
        self.is_made = False
        self.is_open = False
        self.entered = False
        self.steps: tuple[tuple[Phase, Call], ...] = ()
        self.terminate: Call | None = None
        self.flaw: DeclarationError | None = None

    async def open(
        self,
        needs: Sequence[Any],
        others: Collection[Any],
        gateway: drivers.Isolation | None = None,
    ) -> None:
        """Call the factory with the live values of *needs* and open what it returns.

        *others* are the values that other resources own. *gateway* is there in test mode.
        """
        if gateway is not None and not self.resource.options.sandbox:
            lasting: Any = gateway
            with lasting.lets_last():
                await self._open(needs, others)
            lasting.let_last(self.driver, self.value)
            return
        self._gateway = gateway
        await self._open(needs, others)

    async def _open(self, needs: Sequence[Any], others: Collection[Any]) -> None:
        made: Any = self.resource.factory(*needs)
        awaited = False
        while _is(made, Coroutine):  # an async function may return a driver's own coroutine
            made, awaited = await made, True
        if made is not None and _is_among(made, others):
            self._borrow(made)
        elif inspect.isasyncgen(made):
            await self._carries_its_closing(await self._first(made), partial(self._finish, made))
        elif inspect.isgenerator(made):
            await self._carries_its_closing(self._first_sync(made), partial(self._finish_sync, made))
        elif _is(made, MADE_BY_CONTEXTLIB):
            await self._enter(made)
        else:
            if made is None:
                self._refuse_none()
            plain = _is_plain(made)
            await self._open_value(made, is_open=awaited, is_plain=plain)
            if not (self.steps or self.flaw):
                self._warn_if_it_stays_open(others, is_plain=plain)
        self.is_open = True
        if self._gateway is not None:
            self._prepare_sandbox(needs, self._gateway)

    @property
    def closes(self) -> bool:
        """Whether there is anything to do for its end."""
        return bool(self.steps or self.terminate)

    @property
    def checks(self) -> bool:
        """Whether there is anything to check."""
        return (
            self.driver is not None or self.flaw is not None or self.resource.options.check is not None
        )

    async def check(self) -> None:
        """Raise unless the open value works, as its declaration or else its driver checks it."""
        if self.flaw is not None:
            raise self.flaw
        declared = self.resource.options.check
        if declared is not None:
            if await settle(self._declared("check", declared)()) is False:
                raise LifekitError(f"the check of {self.resource.name} returned False")
        elif self.driver is not None:
            await self._named(self.driver.check, self.value)

    async def _named(self, call: Callable[[Any], Awaitable[Any]], value: Any) -> Any:
        # Drivers rarely say which server it was.
        try:
            return await call(value)
        except Exception as error:
            note_once(error, f"lifekit: opening {self.describe()}")
            raise

    def describe(self) -> str:
        """Return what the value is, with no password."""
        if self.driver is None:
            return type(self.value).__name__
        try:
            return redact(self.driver.describe(self.value))
        except Exception as error:
            return f"{type(self.value).__name__}, whose describe failed: {summary(error)}"

    def holders(self) -> Sequence[str]:
        """Return who holds parts of the value, where its driver knows."""
        try:
            return tuple(self.driver.holders(self.value)) if self.driver is not None else ()
        except Exception as error:
            return (f"not known: holders() failed: {summary(error)}",)

    # -- opening ----------------------------------------------------------------------------

    def _refuse_none(self) -> None:
        from lifekit._util.annotations import value_type

        if hasattr(self.resource.factory, "__wrapped__"):
            return  # what it says, its decorator may not do
        try:
            kind = value_type(self.resource.factory)
            fits = isinstance(None, kind)
        except Exception:  # it is unclear, or can't be asked: it may be anything
            return
        if not fits:
            raise self._broken(
                f"a factory that returned None, and says that it returns {kind.__name__}",
                f"Is `return` missing? Else say that there may be none: -> {kind.__name__} | None.",
            )

    def _borrow(self, value: Any) -> None:
        self.value, self.is_made = value, True
        self._gateway = None  # whose value it is, has its sandbox
        self.steps = self._declared_steps()
        if (declared := self.resource.options.terminate) is not None:
            self.terminate = self._flawless("terminate", declared)

    async def _open_value(self, value: Any, *, is_open: bool, is_plain: bool) -> None:
        self._take(value)
        await self._redirect()
        self.steps = self._declared_steps()
        if self.driver is not None:
            if not self.steps:
                self.steps = (
                    ("close", partial(self._driven, "close")),
                    ("wait_closed", partial(self._driven, "wait_closed")),
                )
            self.value = await self._named(self.driver.open, value)
        elif _is(value, asyncio.Task):
            self.steps = self.steps or (
                ("close", value.cancel),
                ("wait_closed", partial(_ended, value)),
            )
        elif not (self.steps or is_plain):
            await self._by_protocol(value, is_open=is_open)

    async def _by_protocol(self, value: Any, *, is_open: bool) -> None:
        two_phases = _has(value, "close") and _has(value, "wait_closed")
        names = ("close", "wait_closed") if two_phases else ("aclose",)
        if not _has(value, names[0]):
            if not is_open and _is_entered(value, "__aenter__", "__aexit__"):
                await self._enter(value)
                return
            names = ("close",)
        if _has(value, names[0]):
            phases: tuple[Phase, ...] = ("close", "wait_closed")
            for phase, name in zip(phases, names, strict=False):
                if (method := self._method(name)) is not None:
                    self.steps = (*self.steps, (phase, method))
        elif not is_open and _is_entered(value, "__enter__", "__exit__"):
            await self._enter(value)
        elif (close := self._other_closing(value)) is not None:
            self.steps = (("close", close),)

    def _other_closing(self, value: Any) -> Call | None:
        for name in OTHER_CLOSINGS:
            method = getattr(value, name) if _has(value, name) else None
            if method is None or not callable(method):
                continue
            if _takes_nothing(method):
                return method  # type: ignore[no-any-return]
            if (parameter := _only_parameter(method)) in SECONDS:
                # Half of its time: what comes after those seconds needs some, too.
                seconds = min(self._close_timeout() / 2, 3600.0)
                return partial(method, **{parameter: seconds})
        if (leave := _exit_of(value)) is not None:  # it is open already, however that was done
            return partial(leave, value, None, None, None)
        return None

    def _close_timeout(self) -> float:
        declared = self.resource.options.close_timeout
        return self.resource.registry.close_timeout if declared is None else declared

    async def _enter(self, manager: Any) -> None:
        kind = cast("Any", type(manager))
        if hasattr(kind, "__aenter__"):
            value = await kind.__aenter__(manager)
            leave: Call = partial(kind.__aexit__, manager, None, None, None)
        else:
            value = kind.__enter__(manager)
            leave = partial(kind.__exit__, manager, None, None, None)
        if value is None and not _is(manager, MADE_BY_CONTEXTLIB):
            value = manager  # many an __aenter__ returns nothing
        await self._carries_its_closing(value, leave)

    def _warn_if_it_stays_open(self, others: Collection[Any], *, is_plain: bool) -> None:
        if (what := _left_open(self.value, others, is_plain=is_plain)) is not None:
            warnings.warn(
                f"{self.resource.name} ({self.resource.location}) would stay open when its lifespan "
                f"ends: lifekit does not know how to close {what}. Say it, close=lambda value: …, or "
                "yield the value and close it after the yield. Where nothing is to be closed: "
                "close=lambda value: None.",
                RuntimeWarning,
                stacklevel=2,
            )

    async def _redirect(self) -> None:
        if self._gateway is not None and self.driver is not None:
            self.sandbox = self.driver.redirect(self.value, self._gateway)
            if self.sandbox is not None:
                self._cut_off_with(self.sandbox)
            await self._named(self.driver.reconnect, self.value)

    def _prepare_sandbox(self, needs: Sequence[Any], gateway: drivers.Isolation) -> None:
        before = self.sandbox
        if self.driver is not None:
            self.sandbox = self.driver.sandbox(self.value) or before
        if self.sandbox is None:
            self.sandbox = gateway.refusal(self.resource, self.value, needs, self.driver)
            return
        self.steps = (("close", self.sandbox.close), *self.steps)
        phase, last = self.steps[-1]
        closed = partial(_one_after_the_other, last, self.sandbox.closed)
        self.steps = (*self.steps[:-1], (phase, closed))
        if before is not self.sandbox:
            self._cut_off_with(self.sandbox)

    def _cut_off_with(self, sandbox: drivers.Sandbox) -> None:
        terminate = self.terminate

        def cut_both_off() -> object:
            sandbox.terminate()
            return terminate() if terminate is not None else None

        self.terminate = cut_both_off

    async def _carries_its_closing(self, value: Any, leave: Call) -> None:
        self._take(value)
        await self._redirect()
        if self.driver is not None:
            self.driver.watch(value)
        self.entered = True
        declared = self._declared_steps()
        # Alone it is the close; behind a declared close it is what ends the waiting.
        self.steps = (*declared, ("wait_closed" if declared else "close", leave))

    def _take(self, value: Any) -> None:
        self.value, self.is_made = value, True
        self.driver = drivers.find(value)
        declared = self.resource.options.terminate
        if declared is not None:
            self.terminate = self._flawless("terminate", declared)
        elif self.driver is not None:
            self.terminate = partial(self._driven, "terminate")
        else:
            self.terminate = self._method("terminate")

    def _driven(self, name: str) -> object:
        result: object = getattr(self.driver, name)(self.value)
        return result

    # -- what the declaration and the value say ----------------------------------------------

    def _declared_steps(self) -> tuple[tuple[Phase, Call], ...]:
        options = self.resource.options
        phases: tuple[tuple[Phase, Step | None], ...] = (
            ("close", options.close),
            ("wait_closed", options.wait_closed),
        )
        found: list[tuple[Phase, Call]] = []
        for phase, step in phases:
            if step is not None and (call := self._flawless(phase, step)) is not None:
                found.append((phase, call))
        return tuple(found)

    def _flawless(self, phase: Phase, step: Step) -> Call | None:
        # A step that can't work fails the opening; the value is then closed by the other rules.
        try:
            return self._declared(phase, step)
        except DeclarationError as flaw:
            self.flaw = self.flaw or flaw
            return None

    def _declared(self, phase: Phase, step: Step) -> Call:
        if not isinstance(step, str):
            return partial(step, self.value)
        method = getattr(self.value, step, None)
        if not callable(method):
            raise self._broken(
                f"{phase}={step!r}, but its {type(self.value).__name__} has no such method",
                f"Name a method that it has, or pass a function: {phase}=lambda value: …",
            )
        return method  # type: ignore[no-any-return]

    def _method(self, name: str) -> Call | None:
        if not _has(self.value, name):
            return None
        method = getattr(self.value, name)
        if not callable(method):
            problem = f"a value whose {name} is {type(method).__name__}, not a method"
        elif not _takes_nothing(method):
            problem = f"a value whose {name}() wants arguments"
        else:
            return method  # type: ignore[no-any-return]
        self.flaw = self._broken(problem, "Say how to close it: close=lambda value: …")
        return None

    def _broken(self, problem: str, mend: str) -> DeclarationError:
        resource = self.resource
        return DeclarationError(f"{resource.name} ({resource.location}) has {problem}. {mend}")

    # -- generators --------------------------------------------------------------------------

    async def _first(self, generator: AsyncGenerator[Any, Any]) -> Any:
        try:
            return await anext(generator)
        except StopAsyncIteration:
            raise self._broken(*_NEVER) from None

    async def _finish(self, generator: AsyncGenerator[Any, Any]) -> None:
        try:
            await anext(generator)
        except StopAsyncIteration:
            return
        try:
            await generator.aclose()
        finally:
            raise self._broken(*_TWICE)

    def _first_sync(self, generator: Generator[Any, Any, Any]) -> Any:
        try:
            return next(generator)
        except StopIteration:
            raise self._broken(*_NEVER) from None

    def _finish_sync(self, generator: Generator[Any, Any, Any]) -> None:
        try:
            next(generator)
        except StopIteration:
            return
        try:
            generator.close()
        finally:
            raise self._broken(*_TWICE)


_NEVER = ("a factory that yields nothing", "Yield the value once.")
_TWICE = ("a factory that yields twice", "Yield once: what follows the yield is the closing.")


def reached_in(frames: Iterable[FrameType], needs: Sequence[Any]) -> str:
    """Return what code that hangs in *frames* was to reach, with no password; '' if it can't be told.

    *needs* are the values of other resources, at hand there as well.
    """
    address = ""
    for frame in frames:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "lifekit":
            continue
        found = frame.f_locals
        for value in [*found.values()]:
            if _is_among(value, needs):
                continue
            with contextlib.suppress(Exception):
                if (driver := drivers.find(value)) is not None:
                    return redact(driver.describe(value))
        # What asyncio, and most drivers on it, call the server that they connect to.
        # A host beside a URL may be no more than a default.
        urls = [found.get(name) for name in ("url", "uri", "dsn", "conninfo")]
        match found.get("addr", found.get("address", (found.get("host"), found.get("port")))):
            case _ if url := next((each for each in urls if type(each) is str and "://" in each), ""):
                address = redact(url).partition("?")[0]
            case (str(host), int(port), *_):
                address = f"{host}:{port}"
            case _ if "host" in (params := _mapping(found.get("params"))):  # psycopg's
                address = f"{params['host']}:{params.get('port', '')}"
            case _:
                pass
    return address


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if type(value) is dict else {}


async def settle(result: object) -> object:
    """Return what a step gave, awaited if it must be."""
    return await cast("Awaitable[object]", result) if _is(result, Awaitable) else result


async def _one_after_the_other(first: Call, second: Call) -> None:
    try:
        await settle(first())
    finally:
        await settle(second())


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    # Unlike isinstance, it leaves a type checker's view of the value as it was.
    return isinstance(value, kind)


def _is_entered(value: object, enter: str, leave: str) -> bool:
    # To enter a lock is to take it, and a process's exit waits for the process.
    home = type(value).__module__.partition(".")[0]
    is_lock = home in _LOCKS and _has(value, "acquire") and _has(value, "release")
    return _has(value, enter) and _has(value, leave) and not is_lock and not _is(value, _NOT_ENTERED)


_LOCKS = {"_thread", "anyio", "asyncio", "multiprocessing", "threading", "trio"}
_NOT_ENTERED = (PurePath, subprocess.Popen)


def _exit_of(value: object) -> Any:
    for enter, leave in (("__aenter__", "__aexit__"), ("__enter__", "__exit__")):
        if _is_entered(value, enter, leave):
            return getattr(type(value), leave)
    return None


async def _ended(task: asyncio.Task[Any]) -> None:
    """Wait for a task that was cancelled, and raise what else it ended with."""
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


def _is_among(value: object, others: Collection[Any]) -> bool:
    for each in others:  # noqa: SIM110 - a third of the time of any()
        if each is value:
            return True
    return False


def _left_open(value: Any, others: Collection[Any], *, is_plain: bool) -> str | None:
    """Return what would stay open of a value without a closing, None if nothing seems to be."""
    kind = type(value).__name__
    if type(value) in (dict, list, set, tuple):
        parts: list[Any] = [*value.values()] if _is(value, dict) else [*value]
        for part in parts[:100]:
            if _is_among(part, others):
                continue
            if drivers.find(part) is not None or any(_has(part, name) for name in _CLOSINGS):
                return f"the {type(part).__name__} in a {kind}"
    if is_plain:
        runs = isinstance(value, threading.Thread) and value.is_alive() and not value.daemon
        return f"a {kind} that runs" if runs else None
    suspicious = [name for name in (*OTHER_CLOSINGS, *_CUT_OFF) if _has_method(value, name)]
    return f"a {kind}, which has {suspicious[0]}()" if suspicious else None


_CUT_OFF = ("terminate", "kill")
_CLOSINGS = ("close", "aclose", *OTHER_CLOSINGS)


_ABILITIES = frozenset({*_CLOSINGS, *_CUT_OFF, "__aenter__", "__enter__"})


def _is_plain(value: object) -> bool:
    """Return whether a value has nothing that could close it: most have not, and one look tells."""
    for kind in type(value).__mro__:
        if not kind.__dict__.keys().isdisjoint(_ABILITIES):
            return False
    try:
        own: dict[str, object] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return True
    return _ABILITIES.isdisjoint(own)


def _has_method(value: object, name: str) -> bool:
    return _has(value, name) and callable(getattr(type(value), name, None))


def _has(value: object, name: str) -> bool:
    # Not of the value: one that invents attributes on demand has no `close` of its own.
    # A class that is itself the value has what its instances have, and can't be called for it;
    # a module is the whole process's, and the event loop that of whoever runs it.
    if isinstance(value, _NO_INSTANCE):
        return False
    try:
        own: dict[str, object] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = {}
    return own.get(name, getattr(type(value), name, None)) is not None


_NO_INSTANCE = (type, ModuleType, asyncio.AbstractEventLoop)


def _takes_nothing(method: Call) -> bool:
    # A plain method says it at once, and most are plain.
    function = method.__func__ if isinstance(method, MethodType) else None
    if type(function) is FunctionType and not function.__dict__:
        code, defaults = function.__code__, function.__defaults__ or ()
        if code.co_argcount - len(defaults) == 1 and code.co_kwonlyargcount == 0:
            return True
    try:
        signature_of(method).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return True
    return True


def _only_parameter(method: Call) -> str:
    """Return the name of the one parameter that a method must be given, '' if there is no such."""
    try:
        parameters = signature_of(method).parameters.values()
    except (TypeError, ValueError):
        return ""
    needed = [each for each in parameters if each.default is each.empty]
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return needed[0].name if len(needed) == 1 and needed[0].kind in positional else ""
