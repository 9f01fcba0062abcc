"""How a factory's result becomes an open value, and how that value is closed.

What a declaration says wins, then the driver of the value's type, then the protocols that the
value itself has. A generator and an entered context manager carry their own closing.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from functools import partial
from typing import Any, cast

from . import drivers
from ._errors import DeclarationError, LifekitError, Phase, note_once, summary
from ._redact import redact
from ._resource import Resource, Step

Call = Callable[[], object]
MADE_BY_CONTEXTLIB = (contextlib.AsyncContextDecorator, contextlib.ContextDecorator)


class Live:
    """One value on its way from its factory to its closing. Opened, checked, closed once each."""

    __slots__ = (
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
        self.is_made = False
        self.is_open = False
        self.entered = False
        self.steps: tuple[tuple[Phase, Call], ...] = ()
        self.terminate: Call | None = None
        self.flaw: DeclarationError | None = None

    async def open(self, needs: Sequence[Any], *, sandboxed: bool = False) -> None:
        """Call the factory with the live values of *needs* and open what it returns."""
        made: Any = self.resource.factory(*needs)
        while _is(made, Coroutine):  # an async function may return a driver's own coroutine
            made = await made
        if inspect.isasyncgen(made):
            self._carries_its_closing(await self._first(made), partial(self._finish, made))
        elif inspect.isgenerator(made):
            self._carries_its_closing(self._first_sync(made), partial(self._finish_sync, made))
        elif _is(made, MADE_BY_CONTEXTLIB):
            await self._enter(made)
        else:
            if made is None:
                self._refuse_none()
            await self._open_value(made)
        self.is_open = True
        if sandboxed and self.driver is not None:
            self._prepare_sandbox(self.driver)

    @property
    def closes(self) -> bool:
        """Whether there is anything to do for its end."""
        return bool(self.steps or self.terminate)

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
        from ._annotations import value_type

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

    async def _open_value(self, value: Any) -> None:
        self._take(value)
        self.steps = self._declared_steps()
        if self.driver is not None:
            if not self.steps:
                self.steps = (
                    ("close", partial(self._driven, "close")),
                    ("wait_closed", partial(self._driven, "wait_closed")),
                )
            self.value = await self._named(self.driver.open, value)
        elif not self.steps:
            await self._by_protocol(value)

    async def _by_protocol(self, value: Any) -> None:
        if _is_entered(value):
            await self._enter(value)
            return
        two_phases = _has(value, "close") and _has(value, "wait_closed")
        close = "close" if two_phases or not _has(value, "aclose") else "aclose"
        phases: tuple[tuple[Phase, str], ...] = (("close", close), ("wait_closed", "wait_closed"))
        for phase, name in phases[: 1 + two_phases]:
            if (method := self._method(name)) is not None:
                self.steps = (*self.steps, (phase, method))

    async def _enter(self, manager: Any) -> None:
        kind = cast("Any", type(manager))
        if hasattr(kind, "__aenter__"):
            value = await kind.__aenter__(manager)
            leave: Call = partial(kind.__aexit__, manager, None, None, None)
        else:
            value = kind.__enter__(manager)
            leave = partial(kind.__exit__, manager, None, None, None)
        self._carries_its_closing(value, leave)

    def _prepare_sandbox(self, driver: drivers.Driver[Any]) -> None:
        self.sandbox = sandbox = driver.sandbox(self.value)
        if sandbox is not None:
            self.steps = (("close", sandbox.close), *self.steps)
            terminate = self.terminate

            def cut_both_off() -> object:
                sandbox.terminate()
                return terminate() if terminate is not None else None

            self.terminate = cut_both_off

    def _carries_its_closing(self, value: Any, leave: Call) -> None:
        self._take(value)
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


async def settle(result: object) -> object:
    """Return what a step gave, awaited if it must be."""
    return await cast("Awaitable[object]", result) if _is(result, Awaitable) else result


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    # Unlike isinstance, it leaves a type checker's view of the value as it was.
    return isinstance(value, kind)


def _is_entered(value: object) -> bool:
    # Of the ways to close a value, that of an async context manager comes behind `aclose` and
    # before `close`; a sync one comes last.
    if _has(value, "aclose") or (_has(value, "close") and _has(value, "wait_closed")):
        return False
    if _has(value, "__aenter__") and _has(value, "__aexit__"):
        return True
    return _has(value, "__enter__") and _has(value, "__exit__") and not _has(value, "close")


def _has(value: object, name: str) -> bool:
    # Not of the value: one that invents attributes on demand has no `close` of its own.
    # A class that is itself the value has what its instances have, and can't be called for it.
    if isinstance(value, type):
        return False
    try:
        own: dict[str, object] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = {}
    return own.get(name, getattr(type(value), name, None)) is not None


def _takes_nothing(method: Call) -> bool:
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return True
    return True
