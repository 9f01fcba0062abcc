"""A lifespan: one run of a registry, its live values, and how its caller waits for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import Token
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, overload

from lifekit import events
from lifekit._util.call_sites import Site, caller_frame
from lifekit._util.loops import call_soon, running_loop, sit_out
from lifekit._util.redact import redact

from .block import Block, Sandboxing, sandboxing, workers_wanted
from .errors import LifekitError, NotOpenError, OverrideError
from .generations import Generation
from .leaving import Ending
from .overrides import (
    MISSING,
    Overrides,
    given,
    make_override,
    of_context,
    overridden,
    overrides,
    refuse_useless,
)
from .plan import Plan
from .resource import Resource
from .running import Start, current, everywhere, why_not_open, wrong_loop
from .signals import forget, listen
from .stopping import Stopping

if TYPE_CHECKING:
    from .drivers import Isolation, Sandbox  # which it begins and ends
    from .engine import Engine  # which runs it
    from .factory import Entered, Produced
    from .health import Checks, Health  # which it is asked for
    from .node import Variables  # which it sets for requests
    from .registry import Registry  # which makes it
    from .resting import Some  # which it lets rest
    from .timeline import Timeline
    from .worker import Worker  # whose states it tells

    Patch = AbstractAsyncContextManager["Lifespan"]

T = TypeVar("T")


class Lifespan(Mapping[str, Any]):
    """One run of a registry: enter it to open everything, leave it to close everything.

    ``lifespan[handle]`` is a live value with its type. As a mapping from names to values it is also
    the state that an ASGI framework hands to requests. It may be entered in one task and left in
    another, and runs once.
    """

    def __init__(
        self,
        registry: Registry,
        plan: Plan,
        location: str | Site,
        *,
        root: Lifespan | None = None,
    ) -> None:
        """Called by `Registry.lifespan`, and by `override` of *root*, beside which this one runs."""
        self.registry = registry
        self._location = location
        self.live: Mapping[Resource[Any], Any] = {}
        self.loop: object | None = None
        self.process: int = 0
        self.start: Start = Start()
        self.sandboxed: bool = False
        self.postgres: Isolation | None = None
        self._gateway: Isolation | None = None
        self.block: Block | None = None
        self.patches: tuple[Lifespan, ...] = ()
        self.overriding: list[str] = []  # where, also while an override is built
        self.generation: Generation = Generation()  # of the requests that begin now
        self.renewed: dict[str, Any] = {}  # values that servers do not have in their state
        self.missing: set[str] = set()  # names of what is not required and not there
        self.variables: Variables = ()  # which factories set, for requests to have as well
        self._variables: Variables = ()  # the same, unless overridden
        self._root = root or self
        self.stopping: Stopping = Stopping(root.stopping if root is not None else None)
        self.crashes: list[tuple[str, str, Exception]] = root.crashes if root is not None else []
        self._checks: Checks | None = None
        self._stop_asked = False
        self._ending = Ending(registry.name)
        self._soon: Callable[[Callable[[], object]], object] = lambda call: call()
        self._sandboxing: Sandboxing | None = None
        self._sandboxes: list[tuple[str, Sandbox]] | None = None
        self._own: dict[Resource[Any], Any] = {}  # the engine's, which is `live` too unless overridden
        self._overrides: Overrides = {}
        self._absent: set[Resource[Any]] = set()  # in the lifespan that this one overrides
        self._base = self._plan = plan
        self._names = {resource.name: resource for resource in plan.resources}
        self._registries = {registry, *(resource.registry for resource in plan.resources)}
        self._engine: Engine | None = None
        self.works: bool = True  # its workers begin, when all is open or when a block begins
        self._rests: Some = {}  # what an override made to rest, by the layer that owns it
        self._left = False
        self._tokens: list[Token[Any]] = []

    @property
    def location(self) -> str:
        """The code line that made it."""
        return str(self._location)  # here, for most are never asked

    # -- values -----------------------------------------------------------------------------

    @overload
    def __getitem__(self, key: Resource[T]) -> T: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...
    def __getitem__(self, key: Resource[T] | str) -> T | Any:
        """Return the live value of a handle, or of a resource's name.

        Raises:
            NotOpenError: It is not open: not yet, or no longer, or it belongs to another registry.
            UnavailableError: It is not required, and is not open now.
            WrongLoopError: The lifespan runs in another event loop.
            OverrideError: An override around this code came too late for this lifespan.
            KeyError: No resource has that name.
        """
        if isinstance(key, str):
            if key not in self._names:
                return self._lifespans()[key]
            key = self._names[key]
        self._refuse_another_loop(key.name)
        if overrides.get():
            refuse_useless(self)
        try:
            return self.live[key]
        except KeyError:
            raise self._why_missing(key) from None

    def _why_missing(self, key: Resource[Any]) -> LifekitError:
        layers = self._root._layers() if self.declares(key) else []
        reasons = [layer.absences.why(key) for layer in reversed(layers) if not layer.stop_asked]
        found = next(filter(None, reasons), None)
        return found or NotOpenError(why_not_open(self, key), resource=key.name)

    def holders(self, key: Resource[Any] | str) -> tuple[str, ...]:
        """Return who now holds parts of a live value, as of a pool its connections.

        Each is the code line that took one, with its task where that is known. It is empty where nobody
        holds any, and where the value's driver does not know.

        Raises:
            NotOpenError: As ``lifespan[key]`` does; so for the other two.
            WrongLoopError: The lifespan runs in another event loop.
            KeyError: No resource has that name.
        """
        from . import drivers

        value = self[key]
        driver = drivers.find(value)
        return tuple(driver.holders(value)) if driver is not None else ()

    def __iter__(self) -> Iterator[str]:
        """Iterate over what requests find in their state: names, and a key for each registry."""
        yield from (name for name in self._names if name not in self.missing)
        yield from self._lifespans()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        named = key in self._names and key not in self.missing
        return key in self.live or named or key in self._lifespans()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<Lifespan of {self.registry.name!r}, {self.location}, {len(self.live)} open>"

    def _refuse_another_loop(self, name: str) -> None:
        here = running_loop()
        if here is not None and self.loop is not None and here is not self.loop:
            raise wrong_loop(name, self, here)

    def _lifespans(self) -> dict[str, Lifespan]:
        # Under these keys a request's own state leads from a handle to this lifespan.
        return {registry.key: self for registry in self._registries}

    def declares(self, resource: Resource[Any]) -> bool:
        """Return whether it is one of this lifespan's resources, open or not."""
        return self._names.get(resource.name) is resource

    # -- running ----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Open everything.

        Raises:
            StartupError: Something failed to open; what had opened is closed again.
            LifekitError: It has run before, or its event loop ended while it started.
        """
        self.refuse_again()
        from .engine import Engine  # here, so that `import lifekit` costs an import of little

        registry = self.registry
        if self._root is self:
            self._read_context()
        self.live = self._own
        self._engine = engine = Engine(
            registry.name,
            self._plan,
            self._own,
            start_timeout=registry.start_timeout,
            close_timeout=registry.close_timeout,
            grace=registry.grace,
            lifespan=self,
            variables=self._root._variables,
            gateway=self._root._gateway,
            block=lambda: self._root.block,
            absent=self._absent,
            workers=self._root._may_work,
            on_crash=registry.on_crash,
            crashes=self.crashes,
            on_event=registry.on_event,
            on_finished=self._retract,
        )
        self.loop, self.process = running_loop(), os.getpid()
        self._soon = call_soon()
        entering = sys._getframe().f_back  # pyright: ignore[reportPrivateUsage]
        if self._root is self:
            self._ending.found(entering)
            if registry.signals:
                listen(self, self._notice, registry.drain_delay)
        current.set((self, *current.get()))
        self._publish()
        engine.start()
        try:
            await engine.ready.wait()
        except BaseException as error:
            engine.stop()
            await self._after(engine, error)
            raise
        if engine.stopping:
            await self._after(engine, None)
            raise LifekitError(f"{registry.name} was stopped while it started")
        # What factories set in their contexts holds in the body, as it does where no lifekit is.
        self._tokens = [variable.set(value) for variable, value in engine.variables]
        self._look_at(engine)
        if self._root is self:
            self.start.is_up(self)
            self._ending.begin(entering)
        return self

    def refuse_again(self) -> None:
        """Refuse to run a second time."""
        if self._engine is not None:
            raise LifekitError(f"the lifespan made at {self.location} has run: make another one")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Close everything.

        Raises:
            ShutdownError: Some closings failed; everything else was closed all the same.
            CrashError: A worker or a resource crashed, and so ended it.
            WrongLoopError: It runs in another event loop, and goes on.
            LifekitError: It was not entered.
        """
        if self._engine is None:
            raise LifekitError(f"the lifespan made at {self.location} was not entered yet")
        if self._engine.finished.is_set() and self._left:
            return None
        self._left = True
        if isinstance(error, GeneratorExit):  # this coroutine is closed, and can't wait any more
            try:
                self._engine.stop()
            except RuntimeError:  # the loop is closed as well
                self._engine.lose()
            return None
        self._refuse_another_loop(self.registry.name)
        came = await self._ending.leave(error)
        try:
            if self.patches:
                from .patching import undo

                await undo(self, self.patches[0])
        finally:
            self._engine.stop()
            await self._after(self._engine, came if not isinstance(came, Exception) else None)
        if came is not error:
            if came is not None:
                raise came
            return True  # lifekit's own cancellation, and nothing failed
        return None

    async def _after(self, engine: Engine, interrupt: BaseException | None) -> None:
        """Wait for the end, whatever comes meanwhile, and raise what has to be raised then."""
        interrupt = await sit_out(engine.finished) or interrupt
        # In another context than it was entered in there is nothing of it to take out.
        current.set(tuple(each for each in current.get() if each is not self))
        for token in reversed(self._tokens):
            with suppress(ValueError):
                token.var.reset(token)
        self._tokens = []
        if engine.interrupts:
            interrupt = engine.interrupts[0]
        failure = engine.failure(self.crashes if self._root is self else [])
        if interrupt is not None:
            # Delivered as it is, since whoever sent it looks for it; the failures are its context.
            try:
                if failure is not None:
                    raise failure
            except LifekitError:
                raise interrupt  # noqa: B904
            raise interrupt
        if failure is not None:
            raise failure

    # -- being told to end --------------------------------------------------------------------

    def stop(self, reason: str = "") -> None:
        """Ask for the end of the application, from anywhere in it; return at once.

        Under a server the process gets SIGTERM, so that requests under way are answered as ever. Else
        the body of ``async with registry.lifespan()`` is cancelled, and leaving it raises nothing.

        Args:
            reason: Why, for the log.

        Raises:
            LifekitError: It was not entered.
        """
        root = self._root
        if root._engine is None:
            raise LifekitError(f"the lifespan made at {self.location} was not entered yet")
        if running_loop() is not root.loop:
            root._soon(lambda: root.stop(reason))
            return
        if root._stop_asked or root._left or root._engine.stopping:
            return
        root._stop_asked = True
        why = redact(reason) if reason else "no reason given"
        root._engine.tell(events.StopNoticed, why, False)
        root.stopping.set()
        if not root._engine.ready.is_set():
            root._engine.stop()
        else:
            root._ending.ask()

    async def health(self) -> Health:
        """Check all resources again, at once, and return how they, the workers and the whole are.

        Each check has five seconds. Callers that come at once share them, and for a second after.
        """
        return await self.checks().health()

    def checks(self) -> Checks:
        """Return what checks its values."""
        from .health import Checks

        root = self._root
        root._checks = root._checks or Checks(root)
        return root._checks

    def crashed(self, name: str, on_crash: str) -> None:
        """Do what a crash asks for; called by the engine."""
        if on_crash == "stop" and self._root.block is None:
            self._root.stop(f"{name} crashed")

    def interrupted(self, error: BaseException) -> None:
        """End the application, where *error* asks for the end of the process; called by the engine."""
        if self._root.block is None:
            self._root.stop(f"{type(error).__name__} was raised in it")

    @property
    def has_crashed(self) -> bool:
        """Whether something has crashed that it does not serve without."""
        return any(layer.has_crashed() for layer in self._layers())

    def _notice(self, reason: str) -> None:
        # Called by a signal handler, amid anything; by Hypercorn's event again and again.
        if self.stopping.is_set():
            return
        self.stopping.mark()
        with suppress(RuntimeError):  # the loop was closed
            self._soon(partial(self._noticed, reason))

    def _noticed(self, reason: str) -> None:
        if self._engine is not None and not self._engine.stopping:
            self._engine.tell(events.StopNoticed, reason, True)
        self.stopping.set()

    # -- what changes while it runs -------------------------------------------------------------

    async def renew(self, resource: Resource[Any]) -> None:
        """Build *resource*, and what is built from it, anew, and close the old values.

        When all of the new ones are open, they serve: what asks from then on gets them, and workers
        built from the old ones end and are run again. The old ones close when the requests that began
        before are over, after `grace` seconds at the latest. Renewals come one after the other.

        Args:
            resource: The handle.

        Raises:
            StartupError: A new one did not open. The others are closed again, and the old ones stay.
            NotOpenError: The lifespan does not run, or does not know it.
            UnavailableError: It is not required, and not open: it is tried again anyway.
            WrongLoopError: The lifespan runs in another event loop.
            OverrideError: An override of the lifespan is in use.
            SandboxUnsupportedError: It is in a block, which the new values would outlive.
            LifekitError: It is a worker, or a value that an override gave; or the stop has begun.
        """
        from .renewals import renew

        self._refuse_another_loop(resource.name)
        await renew(resource, self._root, self._root._started_engine())

    def busy(self) -> str:
        """Return what is in use in which a test would expect no change; nothing outside of tests."""
        root = self._root
        if root.block is not None:
            return f"the sandbox at {root.block.location}"
        return f"the override made at {root.overriding[-1]}" if root.overriding else ""

    def changed(self, resources: Iterable[Resource[Any]]) -> None:
        """Let requests that begin now have the new values of these; called by the engine."""
        self.renewed.update((each.name, self._own[each]) for each in resources)
        self._sandboxes = None
        if self._engine is not None:
            self._look_at(self._engine)

    def _look_at(self, engine: Engine) -> None:
        self.variables = self._variables = (*self._root._variables, *engine.variables)
        self.missing = {each.name for each in self._plan.resources if each not in self._own}

    def next_generation(self, released: Callable[[], object]) -> Generation | None:
        """Begin a new one; return the last one where requests under way began in it, or before."""
        last, self.generation = self.generation, self.generation.next(released)
        return last if last.is_held else None

    # -- test mode ----------------------------------------------------------------------------

    def sandbox(self, *, workers: bool = True) -> Block:
        """Undo all that is done to its values inside ``async with lifespan.sandbox():``.

        Args:
            workers: Run the workers inside of it, and end them before all is undone.

        Raises:
            SandboxError: At the ``async with``: the lifespan was not opened in
                `lifekit.testing.sandboxing`.
            SandboxBusyError: Likewise: it is in another block.
            SandboxEscapedError: At the end: something is still in use, or could not be undone.
            CrashError: At the end: a worker has crashed.
        """
        return Block(self._root, Site(caller_frame()), workers=workers)

    async def run_once(self, worker: Worker) -> None:
        """Run a worker's function once, here, with the live values of what it needs.

        Raises:
            NotOpenError: One of them is not open; so for the other one.
            WrongLoopError: The lifespan runs in another event loop.
            BaseException: What the function raised.
        """
        await cast("Awaitable[object]", worker.factory(*[self[need] for need in worker.needs]))

    def _layers(self) -> list[Engine]:
        """Return its run, and those of its overrides, the innermost last."""
        found = (each._engine for each in (self, *self.patches))
        return [engine for engine in found if engine is not None]

    def _may_work(self) -> bool:
        wanted = self.works and (self.block is None or self.block.works)
        return wanted and (not self.sandboxed or self.block is not None)

    def sandboxes(self) -> list[tuple[str, Sandbox]]:
        """Return the names and sandboxes of the values that it opened, what others need first."""
        if self._sandboxes is None and self._engine is not None:
            self._sandboxes = self._engine.sandboxes()
        return self._sandboxes or []

    @overload
    def override(self, resource: Resource[T], value: T | Resource[T]) -> Patch: ...
    @overload
    def override(self, resource: Resource[T], *, factory: Callable[..., Entered[T]]) -> Patch: ...
    @overload
    def override(self, resource: Resource[T], *, factory: Callable[..., Produced[T]]) -> Patch: ...
    @overload
    def override(self, resource: Resource[T], *, factory: Callable[..., T]) -> Patch: ...
    def override(self, resource: Any, value: Any = MISSING, *, factory: Any = None) -> Patch:
        """Serve something else than *resource*, and what is then built from it, inside ``async with``.

        What depends on the resource is built a second time, the rest is shared. Requests find the new
        values, and ``as`` gives a lifespan that holds them; at the end the new ones are closed and the
        old ones serve again. Those stay open all the while, but for what would go on working with the
        old value: workers, and resources that have tasks of their own, with what needs them. These are
        ended before the new ones begin, and begun anew at the end.

        Args:
            resource: The handle.
            value: What stands in for it, which is neither opened nor closed; or another handle, whose
                live value it then is.
            factory: Makes what stands in, with a lifecycle of its own. It takes nothing, or what the
                resource's own factory takes.

        Raises:
            OverrideError: An unknown handle, a value of the wrong type, a factory that does not fit; at
                the ``async with``, that the lifespan does not run; at its end, that another override
                inside it was still in use.
            StartupError: At the ``async with``: something did not open. Everything is as before.
        """
        made = make_override(resource, value, factory)
        for each in (made.resource, *made.declaration.needs):
            if not self.declares(each):
                raise OverrideError(f"{made.location}: {why_not_open(self, each)}")
        from .patching import patch  # here, for production never needs it

        return patch(self._root, made)

    def _read_context(self) -> None:
        self.works = workers_wanted.get()
        self._sandboxing = sandboxing.get()
        if self._sandboxing is not None:
            self.sandboxed = True
            self.postgres = self._gateway = self._sandboxing.isolation()
            self._sandboxing.lifespans.append(self)
        self._overrides = of_context(self.declares)
        self._plan = overridden(self._base, self._overrides)
        self._own.update(given(self._overrides))

    # -- being found --------------------------------------------------------------------------

    def _publish(self) -> None:
        everywhere[self.loop] = (*everywhere.get(self.loop, ()), self)
        for registry in self._registries:
            registry.running[self.loop] = (*registry.running.get(self.loop, ()), self)

    def _retract(self) -> None:
        self.stopping.forget()
        if self._gateway is not None:
            self._gateway.finish()
        if self._sandboxing is not None:
            self._sandboxing.lifespans.remove(self)
        forget(self)
        for running in (everywhere, *(registry.running for registry in self._registries)):
            left = tuple(each for each in running.get(self.loop, ()) if each is not self)
            if left:
                running[self.loop] = left
            else:
                running.pop(self.loop, None)

    # -- pictures -----------------------------------------------------------------------------

    @property
    def startup(self) -> Timeline:
        """How the start went: ``print`` it."""
        return self._started_engine().start_timeline()

    @property
    def shutdown(self) -> Timeline:
        """How the stop went: ``print`` it."""
        return self._started_engine().stop_timeline()

    def _started_engine(self) -> Engine:
        if self._engine is None:
            raise LifekitError(f"the lifespan made at {self.location} was not entered yet")
        return self._engine
