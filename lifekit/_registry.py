"""What users declare with."""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Protocol,
    TypedDict,
    TypeVar,
    TypeVarTuple,
    Unpack,
    cast,
    overload,
)

from ._errors import DeclarationError, OverrideError
from ._factory import Entered, Produced, misfit
from ._graph import Plan, duplicate, refuse_duplicates
from ._graph import plan as make_plan
from ._lifespan import Lifespan
from ._overrides import MISSING, Overriding, check, make_override
from ._resource import Options, Resource, Step, Transient
from ._stack import Site, caller, caller_frame, definition
from .asgi import bind_requests

if TYPE_CHECKING:
    from .events import Event

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
    sandbox: bool
    """False leaves the value alone in test mode: what tests do to it may last."""


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


class Registry:
    """An ordered set of declarations; it can be run many times, also at once in several loops.

    Args:
        name: Its name in errors, logs and pictures.
        start_timeout: Seconds for one resource's opening.
        close_timeout: Seconds for one resource's ``close`` and ``wait_closed`` together.
        grace: Seconds for the whole shutdown.
        on_event: Called with each `Event`, beside the logging of the logger ``lifekit``.
    """

    def __init__(
        self,
        name: str = "app",
        *,
        start_timeout: float = 30.0,
        close_timeout: float = 10.0,
        grace: float = 25.0,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        timeouts = {"start_timeout": start_timeout, "close_timeout": close_timeout, "grace": grace}
        for option, value in timeouts.items():
            _refuse_unless(_is_seconds(value), option, value, _SECONDS)
        call: object = type(on_event).__call__ if callable(on_event) else None
        awaited = inspect.iscoroutinefunction(on_event) or inspect.iscoroutinefunction(call)
        _refuse_unless(not awaited, "on_event", on_event, "a sync function; it is not awaited")
        self.name = name
        self.start_timeout = start_timeout
        self.close_timeout = close_timeout
        self.grace = grace
        self.on_event = on_event
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
        after: Any = options.get("after") or ()
        if isinstance(after, Resource):
            raise DeclarationError(f"{caller()}: after takes several handles: after=[{after.name}].")
        options["after"] = after = tuple(after)
        for need in (*needs, *after):
            if not isinstance(need, Resource):
                raise DeclarationError(
                    f"{caller()}: a {type(need).__name__} stands where a handle is expected. What a "
                    "resource needs is named by handles, the names that @registry.resource decorates; "
                    "a ready-made value can't be one, since it belongs to no lifespan: return it from "
                    "a factory instead."
                )
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
        _refuse_bad_options(options)
        if issubclass(type(factory), Resource) or not callable(factory):
            raise DeclarationError(
                f"{caller()}: a {type(factory).__name__} stands where a factory is expected. A value "
                "made beforehand belongs to whichever event loop first uses it; return it from a "
                "function, so that every lifespan makes its own: @registry.resource / def name(): …"
            )
        location = definition(factory)
        name = options.get("name") or str(getattr(factory, "__name__", ""))
        if not name.isidentifier() or keyword.iskeyword(name):
            raise DeclarationError(
                f"{location}: {name!r} can't be a resource's name, since request.state.<name> is how "
                "requests reach it. Give it another: name='…'."
            )
        if (first := self._named.get(name)) is not None:
            raise duplicate(first, name, location)
        _refuse_unfit(factory, name, location, len(needs))
        resource: Resource[Any] = Resource(
            name=name,
            factory=factory,
            needs=needs,
            after=tuple(options.get("after", ())),
            options=Options(
                start_timeout=options.get("start_timeout"),
                close_timeout=options.get("close_timeout"),
                retry=options.get("retry") or 0,
                transient=_transient(options.get("transient")),
                check=options.get("check"),
                close=options.get("close"),
                wait_closed=options.get("wait_closed"),
                terminate=options.get("terminate"),
                sandbox=options.get("sandbox") is not False,
            ),
            registry=self,
            location=location,
        )
        self._named[name] = resource
        self._entries.append(resource)
        return resource

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


_SECONDS = "seconds, 0 or more; math.inf is no limit"
_SANDBOX = "False, where what tests do to the value may last, or True"
_STEP = "a method's name, or a function of the value"
_TRANSIENT = "exception types, or a function of the error that is not async"


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _refuse_unless(fits: bool, option: str, value: object, wanted: str) -> None:
    if not fits:
        raise DeclarationError(f"{caller()}: {option}={value!r} can't be. It takes {wanted}.")


def _refuse_bad_options(options: Declaration) -> None:
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        match option:
            case "start_timeout" | "close_timeout":
                _refuse_unless(_is_seconds(value), option, value, _SECONDS)
            case "retry":
                counts = isinstance(value, int) and not isinstance(value, bool) and value >= 0
                _refuse_unless(counts, option, value, "how many more attempts: 0 or more")
            case "transient":
                _refuse_unless(_tells_transient(value), option, value, _TRANSIENT)
            case "name":
                _refuse_unless(isinstance(value, str), option, value, "a name")
            case "sandbox":
                _refuse_unless(isinstance(value, bool), option, value, _SANDBOX)
            case "check" | "close" | "wait_closed" | "terminate":
                _refuse_unless(isinstance(value, str) or callable(value), option, value, _STEP)
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


def _transient(value: Any) -> Transient | None:
    """Return the types as a tuple, which stays as it is."""
    if _is_error_type(value):
        return (value,)
    return value if callable(value) or value is None else tuple(value)


def _refuse_unfit(factory: Callable[..., Any], name: str, location: str, needs: int) -> None:
    if (why := misfit(factory, needs)) is not None:
        raise DeclarationError(
            f"{name} ({location}) is declared with {needs} needs, and its factory does not take them: "
            f"{why}. It gets their values by position: @registry.resource(first, second) / "
            f"def {name}(first, second): …"
        )
