"""A lifespan: one run of a registry, its live values, and how its caller waits for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from ._backend import running_loop
from ._errors import LifekitError, NotOpenError, ShutdownError, StartupError
from ._graph import Plan
from ._resource import Resource
from ._running import current, wrong_loop

if TYPE_CHECKING:
    from ._engine import Engine
    from ._registry import Registry
    from ._timeline import Timeline

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
        location: str,
        shared: Mapping[Resource[Any], Any] | None = None,
    ) -> None:
        """Called by `Registry.lifespan`; *shared* values are used as they are, and left alone."""
        self.registry = registry
        self.location = location
        self.values: dict[Resource[Any], Any] = dict(shared or ())  # type: ignore[assignment]
        self.loop: object | None = None
        self._plan = plan
        self._names = {resource.name: resource for resource in plan.resources}
        self._registries = {registry, *(resource.registry for resource in plan.resources)}
        self._engine: Engine | None = None
        self._left = False

    # -- values -----------------------------------------------------------------------------

    @overload
    def __getitem__(self, key: Resource[T]) -> T: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...
    def __getitem__(self, key: Resource[T] | str) -> T | Any:
        """Return the live value of a handle, or of a resource's name.

        Raises:
            NotOpenError: It is not open: not yet, or no longer, or it belongs to another registry.
            WrongLoopError: The lifespan runs in another event loop.
            KeyError: No resource has that name.
        """
        if isinstance(key, str):
            if key not in self._names:
                return self._lifespans()[key]
            key = self._names[key]
        self._refuse_another_loop(key.name)
        try:
            return self.values[key]
        except KeyError:
            raise NotOpenError(self._why_not_open(key), resource=key.name) from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over what requests find in their state: names, and a key for each registry."""
        yield from self._names
        yield from self._lifespans()

    def __len__(self) -> int:
        return len(self._names) + len(self._lifespans())

    def __contains__(self, key: object) -> bool:
        return key in self.values or key in self._names or key in self._lifespans()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<Lifespan of {self.registry.name!r}, {self.location}, {len(self.values)} open>"

    def _refuse_another_loop(self, name: str) -> None:
        here = running_loop()
        if here is not None and self.loop is not None and here is not self.loop:
            raise wrong_loop(name, self, here)

    def _lifespans(self) -> dict[str, Lifespan]:
        # Under these keys a request's own state leads from a handle to this lifespan.
        return {registry.key: self for registry in self._registries}

    def _why_not_open(self, resource: Resource[Any]) -> str:
        if not self.declares(resource):
            return (
                f"{resource.name} ({resource.location}) belongs to the registry "
                f"{resource.registry.name!r}, and this is a lifespan of {self.registry.name!r}. "
                "Include that registry, or open a lifespan of it."
            )
        state = "not entered yet" if self._engine is None else "closing or closed"
        if self._engine is not None and not self._engine.stopping:
            state = "still starting"
        return (
            f"{resource.name} ({resource.location}) is not open: its lifespan, made at "
            f"{self.location}, is {state}. "
            "Use it inside `async with registry.lifespan()`."
        )

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
        if self._engine is not None:
            raise LifekitError(f"the lifespan made at {self.location} has run: make another one")
        from ._engine import Engine  # here, so that `import lifekit` costs an import of little

        registry = self.registry
        self._engine = engine = Engine(
            registry.name,
            self._plan,
            self.values,
            start_timeout=registry.start_timeout,
            close_timeout=registry.close_timeout,
            grace=registry.grace,
            on_event=registry.on_event,
            on_finished=self._retract,
        )
        self.loop = running_loop()
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
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close everything.

        Raises:
            ShutdownError: Some closings failed; everything else was closed all the same.
            WrongLoopError: It runs in another event loop, and goes on.
            LifekitError: It was not entered.
        """
        if self._engine is None:
            raise LifekitError(f"the lifespan made at {self.location} was not entered yet")
        if self._engine.finished.is_set() and self._left:
            return
        self._left = True
        self._refuse_another_loop(self.registry.name)
        self._engine.stop()
        await self._after(self._engine, error if not isinstance(error, Exception) else None)

    async def _after(self, engine: Engine, interrupt: BaseException | None) -> None:
        """Wait for the end, whatever comes meanwhile, and raise what has to be raised then."""
        interrupt = await engine.sit_out() or interrupt
        # In another context than it was entered in there is nothing of it to take out.
        current.set(tuple(each for each in current.get() if each is not self))
        if engine.interrupts:
            interrupt = engine.interrupts[0]
        failure = self._failure(engine)
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

    def _failure(self, engine: Engine) -> StartupError | ShutdownError | None:
        name = self.registry.name
        shutdown = ShutdownError.of(name, engine.close_failures) if engine.close_failures else None
        if not engine.open_failures:
            return shutdown
        return StartupError.of(
            name,
            engine.open_failures,
            opened=engine.opened(),
            not_begun=engine.not_begun(),
            rollback=shutdown,
        )

    # -- being found --------------------------------------------------------------------------

    def _publish(self) -> None:
        for registry in self._registries:
            registry.running[self.loop] = (*registry.running.get(self.loop, ()), self)

    def _retract(self) -> None:
        for registry in self._registries:
            left = tuple(each for each in registry.running.get(self.loop, ()) if each is not self)
            if left:
                registry.running[self.loop] = left
            else:
                registry.running.pop(self.loop, None)

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
