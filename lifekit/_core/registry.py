"""What users declare with."""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Protocol,
    TypeVar,
    TypeVarTuple,
    Unpack,
    overload,
)

from lifekit._util.call_sites import Site, caller, caller_frame, definition

from .declare_worker import Workers
from .errors import DeclarationError, OverrideError
from .factory import Entered, Produced, misfit
from .lifespan import Lifespan
from .options import (
    CRASHES,
    SECONDS,
    Declaration,
    as_transient,
    is_seconds,
    one_of,
    refuse_bad_options,
    refuse_no_handles,
    refuse_unless,
)
from .overrides import MISSING, Overriding, check, make_override
from .plan import Plan, duplicate, refuse_duplicates
from .plan import plan as make_plan
from .requests import bind_requests
from .resource import Options, Resource
from .worker import OnCrash

if TYPE_CHECKING:
    from lifekit.events import Event  # which name its lifespans

    from .blocking import BlockingLifespan  # which it makes

T = TypeVar("T")
Needs = TypeVarTuple("Needs")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")
G = TypeVar("G")
H = TypeVar("H")


class Declare(Generic[*Needs]):
    """What ``registry.resource(…)`` returns: called with the factory, it gives the handle."""

    def __init__(
        self, registry: Registry, needs: tuple[Resource[Any], ...], options: Declaration
    ) -> None:
        self._registry, self._needs, self._options = registry, needs, options

    @overload
    def __call__(self, factory: Callable[[*Needs], Entered[T]]) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[[*Needs], Produced[T]]) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[[*Needs], T]) -> Resource[T]: ...
    def __call__(self, factory: Callable[..., Any]) -> Resource[Any]:
        """Declare *factory*; its handle takes its name."""
        return self._registry._declare(factory, self._needs, self._options)  # pyright: ignore[reportPrivateUsage]


class DeclareMany(Protocol):
    """`Declare` for more needs than type checkers count: it takes any factory."""

    @overload
    def __call__(self, factory: Callable[..., Entered[T]]) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[..., Produced[T]]) -> Resource[T]: ...
    @overload
    def __call__(self, factory: Callable[..., T]) -> Resource[T]: ...


class Registry(Workers):
    """An ordered set of declarations; it can be run many times, also at once in several loops.

    Args:
        name: Its name in errors, logs and pictures.
        start_timeout: Seconds for one resource's opening.
        close_timeout: Seconds for one resource's ``close`` and ``wait_closed`` together.
        grace: Seconds for the whole shutdown.
        on_event: Called with each `Event`, beside the logging of the logger ``lifekit``.
        on_crash: What follows where a task group of an open resource dies: ``"stop"`` the application,
            only make it ``"unready"``, or ``"ignore"``.
        drain_delay: Seconds for which health is not ready and the server has not heard of SIGTERM yet,
            for load balancers: under uvicorn, gunicorn, and Hypercorn with workers.
        signals: Hear SIGTERM and SIGINT before the server acts on them, for `stopping`.
    """

    def __init__(
        self,
        name: str = "app",
        *,
        start_timeout: float = 30.0,
        close_timeout: float = 10.0,
        grace: float = 25.0,
        on_event: Callable[[Event], object] | None = None,
        on_crash: OnCrash = "stop",
        drain_delay: float = 0.0,
        signals: bool = True,
    ) -> None:
        timeouts = {"start_timeout": start_timeout, "close_timeout": close_timeout, "grace": grace}
        timeouts["drain_delay"] = drain_delay
        for option, value in timeouts.items():
            refuse_unless(is_seconds(value), option, value, SECONDS)
        refuse_unless(on_crash in CRASHES, "on_crash", on_crash, one_of(CRASHES))
        call: object = type(on_event).__call__ if callable(on_event) else None
        awaited = inspect.iscoroutinefunction(on_event) or inspect.iscoroutinefunction(call)
        refuse_unless(not awaited, "on_event", on_event, "a sync function; it is not awaited")
        self.name = name
        self.start_timeout = start_timeout
        self.close_timeout = close_timeout
        self.grace = grace
        self.on_event = on_event
        self.on_crash: OnCrash = on_crash
        self.drain_delay = drain_delay
        self.signals = signals
        self.key: str = f"lifekit.{name}.{id(self):x}"
        self.running: dict[object, tuple[Lifespan, ...]] = {}
        self._named: dict[str, Resource[Any]] = {}
        self._entries: list[Resource[Any] | Registry] = []
        self._planned: Plan | None = None

    @overload
    def resource(self, a: Resource[A], /, **options: Unpack[Declaration]) -> Declare[A]: ...
    @overload
    def resource(
        self, a: Resource[A], b: Resource[B], /, **options: Unpack[Declaration]
    ) -> Declare[A, B]: ...
    @overload
    def resource(
        self, a: Resource[A], b: Resource[B], c: Resource[C], /, **options: Unpack[Declaration]
    ) -> Declare[A, B, C]: ...
    @overload
    def resource(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        /,
        **options: Unpack[Declaration],
    ) -> Declare[A, B, C, D]: ...
    @overload
    def resource(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        e: Resource[E],
        /,
        **options: Unpack[Declaration],
    ) -> Declare[A, B, C, D, E]: ...
    @overload
    def resource(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        e: Resource[E],
        f: Resource[F],
        /,
        **options: Unpack[Declaration],
    ) -> Declare[A, B, C, D, E, F]: ...
    @overload
    def resource(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        e: Resource[E],
        f: Resource[F],
        g: Resource[G],
        /,
        *more: Resource[Any],
        **options: Unpack[Declaration],
    ) -> DeclareMany: ...
    @overload
    def resource(self, **options: Unpack[Declaration]) -> Declare[()]: ...
    @overload
    def resource(self, factory: Callable[[], Entered[T]], /) -> Resource[T]: ...
    @overload
    def resource(self, factory: Callable[[], Produced[T]], /) -> Resource[T]: ...
    @overload
    def resource(self, factory: Callable[[], T], /) -> Resource[T]: ...
    def resource(self, *needs: Any, **options: Unpack[Declaration]) -> Any:
        """Declare a resource: ``@registry.resource``, or ``@registry.resource(need, …, option=…)``.

        A factory is a sync or async function that returns the value; a generator function, sync or
        async, that yields it once, whose code after the yield is the closing; or a function that
        returns a context manager, sync or async.

        Args:
            needs: Handles; the factory gets their live values, by position.
            options: See `Declaration`.

        Raises:
            DeclarationError: Not a factory, not a handle, a name that is taken.
        """
        if len(needs) == 1 and not options and not isinstance(needs[0], Resource):
            return self._declare(needs[0], ())
        unknown = options.keys() - Declaration.__annotations__.keys()
        if unknown:
            raise DeclarationError(
                f"{caller()}: a resource has no option {', '.join(sorted(unknown))}. It has "
                f"{', '.join(Declaration.__annotations__)}."
            )
        options["after"] = refuse_no_handles(needs, options.get("after"))
        declare: Declare[*tuple[Any, ...]] = Declare(self, needs, options)
        return declare

    def include(self, registry: Registry) -> None:
        """Make the resources of *registry*, also those it will declare later, part of this one.

        Raises:
            DeclarationError: Two resources would have the same name, or it includes this registry.
        """
        here = caller()
        if self in (path := registry._path_to(self)):
            steps = " -> ".join(f"{each.name!r}" for each in (self, *path))
            raise DeclarationError(f"{here}: the registries include each other in a cycle: {steps}")
        refuse_duplicates((*self._resources(), *registry._resources()))
        self._entries.append(registry)

    def lifespan(self, app: Any = None) -> Lifespan:
        """Return a new run, to be entered with ``async with``.

        It is also what an ASGI framework takes: ``FastAPI(lifespan=registry.lifespan)``.

        Args:
            app: The application, where a framework passes it.

        Raises:
            DeclarationError: A cycle, a duplicate name, or a handle of a registry not included; or the
                application's start has begun a lifespan of it already.
        """
        frame = caller_frame("starlette", "fastapi")
        in_own_task = frame.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names
        where = "the start of the application" if app is not None and in_own_task else Site(frame)
        lifespan = Lifespan(self, self.plan(), where)
        bind_requests(app, lifespan)
        return lifespan

    def run(self, main: Callable[[Lifespan], Awaitable[object]] | None = None) -> int:
        """Be a worker process: open everything, run *main* or the workers, and return an exit status.

        SIGTERM and SIGINT end it in order: `stopping` is set, *main* is cancelled, workers have their
        ``drain``. Without *main* it runs until then. What fails is printed, without passwords. The
        status is 0 where it ended in order, also by a signal; 1 where the start, *main*, a closing or
        a worker failed; 130 where Ctrl-C was pressed again. Write ``sys.exit(registry.run())``.

        Args:
            main: An async function, which gets the lifespan.

        Raises:
            LifekitError: An event loop runs here already.
        """
        from .process import run

        where = Site(caller_frame())
        return run(lambda: Lifespan(self, self.plan(), where), main)

    def blocking(self) -> BlockingLifespan:
        """Return a new run for code without an event loop: ``with registry.blocking() as lifespan:``.

        It runs in a thread of its own. ``lifespan[handle]`` is a live value, and ``lifespan.call`` runs
        what awaits.

        Raises:
            DeclarationError: A cycle, a duplicate name, or a handle of a registry not included.
        """
        from .blocking import BlockingLifespan

        return BlockingLifespan(self, self.plan(), Site(caller_frame()))

    @overload
    def override(self, resource: Resource[T], value: T | Resource[T]) -> Overriding: ...
    @overload
    def override(self, resource: Resource[T], *, factory: Callable[..., Entered[T]]) -> Overriding: ...
    @overload
    def override(self, resource: Resource[T], *, factory: Callable[..., Produced[T]]) -> Overriding: ...
    @overload
    def override(self, resource: Resource[T], *, factory: Callable[..., T]) -> Overriding: ...
    def override(self, resource: Any, value: Any = MISSING, *, factory: Any = None) -> Overriding:
        """Let lifespans that are opened inside ``with registry.override(…):`` use something else.

        The resource itself never opens. Only code in the context of the ``with``, and what is started
        from there, sees the override. They nest: the innermost holds.

        Args:
            resource: The handle.
            value: What stands in for it, which is neither opened nor closed; or another handle, whose
                live value it then is.
            factory: Makes what stands in, with a lifecycle of its own. It takes nothing, or what the
                resource's own factory takes.

        Raises:
            OverrideError: An unknown handle, a value of the wrong type, a factory that does not fit; at
                the ``with``, that it is too late, since a running lifespan has the resource open.
        """
        made = make_override(resource, value, factory)
        plan = self.plan()
        for each in (made.resource, *made.declaration.needs):
            if each not in plan.resources:
                raise OverrideError(
                    f"{made.location}: {each.name} ({each.location}) belongs to the "
                    f"registry {each.registry.name!r}, not to {self.name!r}. Override it there, "
                    "or include that registry: registry.include(other_registry)."
                )
        check(made, plan)
        return Overriding(made)

    def __repr__(self) -> str:
        return f"<Registry {self.name!r}, {sum(1 for _ in self._resources())} resources>"

    def _declare(
        self,
        factory: Callable[..., Any],
        needs: tuple[Resource[Any], ...],
        options: Declaration | None = None,
    ) -> Resource[Any]:
        options = options if options is not None else {}
        refuse_bad_options(options)
        name, location = self.place(factory, options.get("name"), len(needs))
        resource: Resource[Any] = Resource(
            name=name,
            factory=factory,
            needs=needs,
            after=tuple(options.get("after", ())),
            options=Options(
                start_timeout=options.get("start_timeout"),
                close_timeout=options.get("close_timeout"),
                retry=options.get("retry") or 0,
                transient=as_transient(options.get("transient")),
                check=options.get("check"),
                close=options.get("close"),
                wait_closed=options.get("wait_closed"),
                terminate=options.get("terminate"),
                required=options.get("required") is not False,
                renew_every=options.get("renew_every"),
                sandbox=options.get("sandbox") is not False,
            ),
            registry=self,
            location=location,
        )
        self.add(resource)
        return resource

    def place(self, factory: Callable[..., Any], name: str | None, needs: int) -> tuple[str, str]:
        """Return the name and the code line of what is declared, checked; for `Workers` as well."""
        if issubclass(type(factory), Resource) or not callable(factory):
            raise DeclarationError(
                f"{caller()}: a {type(factory).__name__} stands where a factory is expected. A value "
                "made beforehand belongs to whichever event loop first uses it; return it from a "
                "function, so that every lifespan makes its own: @registry.resource / def name(): …"
            )
        location = definition(factory)
        name = name or str(getattr(factory, "__name__", ""))
        if not name.isidentifier() or keyword.iskeyword(name):
            raise DeclarationError(
                f"{location}: {name!r} can't be a resource's name, since request.state.<name> is how "
                "requests reach it. Give it another: name='…'."
            )
        if (first := self._named.get(name)) is not None:
            raise duplicate(first, name, location)
        _refuse_unfit(factory, name, location, needs)
        return name, location

    def add(self, resource: Resource[Any]) -> None:
        """Make it one of this registry's."""
        self._named[resource.name] = resource
        self._entries.append(resource)

    def _resources(self) -> Iterator[Resource[Any]]:
        for entry in self._entries:
            if isinstance(entry, Registry):
                yield from entry._resources()
            else:
                yield entry

    def plan(self) -> Plan:
        """Return the declarations, checked and linked.

        Raises:
            DeclarationError: A cycle, a duplicate name, or a handle of a registry not included.
        """
        resources = tuple(dict.fromkeys(self._resources()))
        if self._planned is None or self._planned.resources != resources:
            self._planned = make_plan(self.name, resources)
        return self._planned

    def _path_to(self, target: Registry) -> tuple[Registry, ...]:
        if self is target:
            return (self,)
        for entry in self._entries:
            if isinstance(entry, Registry) and (path := entry._path_to(target)):
                return (self, *path)
        return ()


def _refuse_unfit(factory: Callable[..., Any], name: str, location: str, needs: int) -> None:
    if (why := misfit(factory, needs)) is not None:
        raise DeclarationError(
            f"{name} ({location}) is declared with {needs} needs, and its factory does not take them: "
            f"{why}. It gets their values by position: @registry.resource(first, second) / "
            f"def {name}(first, second): …"
        )
