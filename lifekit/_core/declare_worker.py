"""``@registry.worker``: work that runs for as long as the application does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, TypeVarTuple, Unpack, cast, overload

from lifekit._util.call_sites import caller, definition

from .errors import DeclarationError
from .options import WorkerDeclaration, refuse_bad_rules, refuse_no_handles
from .resource import Options, Resource
from .worker import Rules, Worker

if TYPE_CHECKING:
    from .registry import Registry  # which declares by it

Needs = TypeVarTuple("Needs")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")
G = TypeVar("G")
Runs = Coroutine[Any, Any, object]
"""What a worker's function returns when it is called."""


class DeclareWorker(Generic[*Needs]):
    """What ``registry.worker(…)`` returns: called with the function, it gives the handle."""

    def __init__(self, declare: Callable[[Callable[..., Any]], Worker]) -> None:
        self._declare = declare

    def __call__(self, function: Callable[[*Needs], Runs]) -> Worker:
        """Declare *function*; its handle takes its name."""
        return self._declare(function)


class DeclareManyWorker(Protocol):
    """`DeclareWorker` for more needs than type checkers count: it takes any async function."""

    def __call__(self, function: Callable[..., Runs]) -> Worker: ...


class Workers:
    """The part of a registry that declares workers."""

    def place(self, factory: Callable[..., Any], name: str | None, needs: int) -> tuple[str, str]:
        """Return the name and the code line of what is declared, checked."""
        raise NotImplementedError

    def add(self, resource: Resource[Any]) -> None:
        """Make it one of this registry's."""
        raise NotImplementedError

    @overload
    def worker(self, a: Resource[A], /, **options: Unpack[WorkerDeclaration]) -> DeclareWorker[A]: ...
    @overload
    def worker(
        self, a: Resource[A], b: Resource[B], /, **options: Unpack[WorkerDeclaration]
    ) -> DeclareWorker[A, B]: ...
    @overload
    def worker(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        /,
        **options: Unpack[WorkerDeclaration],
    ) -> DeclareWorker[A, B, C]: ...
    @overload
    def worker(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        /,
        **options: Unpack[WorkerDeclaration],
    ) -> DeclareWorker[A, B, C, D]: ...
    @overload
    def worker(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        e: Resource[E],
        /,
        **options: Unpack[WorkerDeclaration],
    ) -> DeclareWorker[A, B, C, D, E]: ...
    @overload
    def worker(
        self,
        a: Resource[A],
        b: Resource[B],
        c: Resource[C],
        d: Resource[D],
        e: Resource[E],
        f: Resource[F],
        /,
        **options: Unpack[WorkerDeclaration],
    ) -> DeclareWorker[A, B, C, D, E, F]: ...
    @overload
    def worker(
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
        **options: Unpack[WorkerDeclaration],
    ) -> DeclareManyWorker: ...
    @overload
    def worker(self, **options: Unpack[WorkerDeclaration]) -> DeclareWorker[()]: ...
    @overload
    def worker(self, function: Callable[[], Runs], /) -> Worker: ...
    def worker(self, *needs: Any, **options: Unpack[WorkerDeclaration]) -> Any:
        """Declare a worker: ``@registry.worker``, or ``@registry.worker(need, …, option=…)``.

        It is an async function, which gets the live values of its needs by position. It begins when all
        of the registry is open, and ends before anything that it needs begins to close. Where it fails
        it is run again, after 0.1 seconds and twice as long each time, up to 30.

        Args:
            needs: Handles of resources.
            options: See `WorkerDeclaration`.

        Raises:
            DeclarationError: Not an async function, not a handle, a name that is taken.
        """
        if len(needs) == 1 and not options and not isinstance(needs[0], Resource):
            return self._declare_worker((), {}, needs[0])
        unknown = options.keys() - WorkerDeclaration.__annotations__.keys()
        if unknown:
            raise DeclarationError(
                f"{caller()}: a worker has no option {', '.join(sorted(unknown))}. It has "
                f"{', '.join(WorkerDeclaration.__annotations__)}."
            )
        refuse_bad_rules(options)
        checked: Any = options
        leader = [each for each in [options.get("leader")] if each is not None and each not in needs]
        after = refuse_no_handles(needs, options.get("after"), workers=True)
        checked["after"] = tuple(dict.fromkeys((*after, *leader)))
        return DeclareWorker[*tuple[Any, ...]](partial(self._declare_worker, needs, options))

    def _declare_worker(
        self, needs: tuple[Any, ...], options: WorkerDeclaration, function: Callable[..., Any]
    ) -> Worker:
        if not _is_async(function):
            raise DeclarationError(
                f"{definition(function) if callable(function) else caller()}: a worker is an async "
                f"function, and this {type(function).__name__} is none. Write `async def`, and let "
                "what blocks run in a thread: await asyncio.to_thread(…)."
            )
        name, location = self.place(function, options.get("name"), len(needs))
        rules: dict[str, Any] = {
            key: value for key, value in options.items() if key in Rules.__dataclass_fields__
        }
        worker = Worker(
            name=name,
            factory=function,
            needs=needs,
            after=tuple(options.get("after", ())),
            options=Options(close_timeout=options.get("close_timeout")),
            registry=cast("Registry", self),
            location=location,
            rules=Rules(**rules),
        )
        self.add(worker)
        return worker


def _is_async(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    if inspect.isroutine(function):
        return inspect.iscoroutinefunction(inspect.unwrap(function))
    return callable(function) and inspect.iscoroutinefunction(type(function).__call__)
