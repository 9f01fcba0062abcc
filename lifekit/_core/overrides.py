"""Overrides: what stands in for a resource, and where it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from lifekit._util.call_sites import caller, definition
from lifekit._util.loops import running_loop

from .errors import DeclarationError, OverrideError
from .factory import misfit
from .plan import Plan
from .plan import plan as make_plan
from .resource import Options, Resource
from .running import current
from .worker import Worker

if TYPE_CHECKING:
    from .lifespan import Lifespan  # in which they hold


class Missing:
    """The type of `MISSING`, which stands where no value was given: None is a value."""


MISSING: Final = Missing()


@dataclass(eq=False)
class Override:
    """One resource's stand-in: its own declaration, another resource, or its giver's value."""

    resource: Resource[Any]
    declaration: Resource[Any]
    location: str
    value: Any = MISSING
    used: bool = False
    fixture: Any = None
    """The pytest fixture that made it, if that outlasts a test."""


Overrides = Mapping[Resource[Any], Override]

overrides: ContextVar[tuple[Override, ...]] = ContextVar("lifekit.overrides", default=())
"""The overrides of this context, the outermost first."""
entered: dict[Override, int] = {}
"""Those of all contexts in the order of their beginning, each with the thread that it began in."""


def make_override(resource: Resource[Any], value: Any, factory: Callable[..., Any] | None) -> Override:
    """Return a checked override.

    Raises:
        OverrideError: Not a handle, a value of the wrong type, a factory that is no factory.
    """
    here = caller()
    if not isinstance(resource, Resource):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OverrideError(
            f"{here}: a {type(resource).__name__} can't be overridden; name the resource by its "
            "handle, the name that @registry.resource decorates."
        )
    if isinstance(resource, Worker):
        raise OverrideError(
            f"{here}: {resource.name} ({resource.location}) is a worker, which can't be overridden. "
            "Override what it needs, or leave workers out: lifespan.sandbox(workers=False)."
        )
    name = resource.name
    if (value is MISSING) == (factory is None):
        raise OverrideError(
            f"{here}: an override of {name} takes a value, override({name}, value), or a factory, "
            f"override({name}, factory=make_{name})."
        )
    if isinstance(value, Resource):
        other: Resource[Any] = value  # pyright: ignore[reportUnknownVariableType]
        _refuse_another_type(here, resource, other)
        options = Options(required=resource.options.required)
        made = replace(
            resource, factory=_passed_on, needs=(other,), after=(), options=options, location=here
        )
        return Override(resource, made, here)
    if factory is None:
        _refuse_wrong_type(here, resource, value)
        made = replace(resource, factory=lambda: value, needs=(), after=(), location=here)
        return Override(resource, made, here, value)
    return Override(resource, _declared(here, resource, factory), here)


def _passed_on(value: object) -> object:
    return value


def _refuse_wrong_type(here: str, resource: Resource[Any], value: object) -> None:
    from lifekit._util.annotations import (  # here, so that `import lifekit` costs no more
        Unclear,
        value_type,
    )

    try:
        kind = value_type(resource.factory)
        # A mock without a spec claims to be anything.
        if isinstance(value, kind) or type(value).__module__ == "unittest.mock":
            return
    except (Unclear, TypeError):  # a protocol that can't be asked at run time
        return
    name = resource.name
    raise OverrideError(
        f"{here}: {name} ({resource.location}) is a {kind.__name__}, and a {type(value).__name__} "
        f"would stand in for it. Give an instance of {kind.__name__}, or of a subclass: "
        f"lifekit.testing.mock({name}) makes a mock of it."
    )


def _refuse_another_type(here: str, resource: Resource[Any], other: Resource[Any]) -> None:
    from lifekit._util.annotations import Unclear, value_type

    try:
        wanted, given_kind = value_type(resource.factory), value_type(other.factory)
        if issubclass(given_kind, wanted):
            return
    except (Unclear, TypeError):
        return
    raise OverrideError(
        f"{here}: {resource.name} ({resource.location}) is a {wanted.__name__}, and {other.name} "
        f"({other.location}), a {given_kind.__name__}, would stand in for it. Name a resource of the "
        f"type {wanted.__name__}, or of a subclass."
    )


def _declared(here: str, resource: Resource[Any], factory: Callable[..., Any]) -> Resource[Any]:
    if issubclass(type(factory), Resource) or not callable(factory):
        raise OverrideError(
            f"{here}: a {type(factory).__name__} stands where a factory is expected. A value is given "
            f"without factory=: override({resource.name}, value)."
        )
    # Its own needs are none, or those of what it stands in for.
    for needs in ((), resource.needs):
        if misfit(factory, len(needs)) is None:
            return replace(
                resource,
                factory=factory,
                needs=needs,
                after=(),
                options=Options(
                    start_timeout=resource.options.start_timeout,
                    close_timeout=resource.options.close_timeout,
                    required=resource.options.required,
                ),
                location=definition(factory),
            )
    names = ", ".join(need.name for need in resource.needs)
    raise OverrideError(
        f"{here}: the factory at {definition(factory)} fits neither def {resource.name}() nor "
        f"def {resource.name}({names}), the values that {resource.name} itself is built from."
    )


class Overriding:
    """What ``registry.override(…)`` returns: lifespans that are opened inside ``with`` use it."""

    def __init__(self, override: Override) -> None:
        self._override = override
        self._entered = False

    def __enter__(self) -> None:
        """Begin.

        Raises:
            OverrideError: The resource is open already, in a lifespan that this code is inside of.
        """
        override = self._override
        if self._entered:
            raise OverrideError(f"the override made at {override.location} was entered before")
        for lifespan in current.get():
            if override.resource in lifespan.live:
                raise _too_late(override, lifespan.location)
        self._entered = True
        entered[override] = get_ident()
        overrides.set((*overrides.get(), override))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End.

        Raises:
            OverrideError: It changed nothing: no lifespan was opened inside, and one had been before.
        """
        override = self._override
        entered.pop(override, None)
        # In another context than it was entered in there is nothing of it to take out.
        overrides.set(tuple(each for each in overrides.get() if each is not override))
        if override.used or isinstance(error, OverrideError):
            return
        here = running_loop()
        for loop, lifespans in list(override.resource.registry.running.items()):
            for lifespan in lifespans:
                if override.resource not in lifespan.live:
                    continue
                late = _too_late(override, lifespan.location)
                if error is not None:
                    with suppress(Exception):  # an error of the user's may refuse notes
                        error.add_note(f"lifekit: {late}")
                    return
                if here in (None, loop):
                    raise late


def refuse_useless(lifespan: Lifespan) -> None:
    """Raise where code inside an override comes to a lifespan that was opened before it.

    At the ``with`` that can't be known: a lifespan that is opened inside uses the override.

    Raises:
        OverrideError: The override changes nothing so far, and this lifespan has the resource open.
    """
    for override in overrides.get():
        # One of a fixture that lasts is for tests that ask for it: the pytest plugin looks at those.
        if not override.used and override.fixture is None and override.resource in lifespan.live:
            raise _too_late(override, lifespan.location)


def _too_late(override: Override, opened_at: str) -> OverrideError:
    name = override.resource.name
    return OverrideError(
        f"{override.location}: {name} ({override.resource.location}) is open already, in the lifespan "
        f"made at {opened_at}, and what was built from it keeps it: this override changes nothing. "
        f"registry.override() is for lifespans opened inside it. On a running one write "
        f"`async with lifespan.override({name}, …):`, which rebuilds what depends on {name}."
    )


def of_context(declared: Callable[[Resource[Any]], bool]) -> Overrides:
    """Return the overrides of this context for what is *declared*, and count them as used."""
    found: dict[Resource[Any], Override] = {}
    for each in overrides.get():
        if declared(each.resource):
            each.used = True  # also one that another hides: without that it would hold
            found[each.resource] = each
    return found


def overridden(plan: Plan, found: Overrides) -> Plan:
    """Return the plan in which the overrides *found* stand in.

    Raises:
        OverrideError: A resource stands in for one that it needs, or belongs to no registry here.
    """
    if not found:
        return plan
    replaced = {resource: each.declaration for resource, each in found.items()}
    try:
        return make_plan("", plan.resources, replaced)
    except DeclarationError as error:
        made = ", ".join(each.location for each in found.values())
        raise OverrideError(f"the override at {made} can't hold: {error}") from None


def check(override: Override, plan: Plan) -> None:
    """Raise where it can't hold in *plan*, with the overrides of this context around it."""
    around = {each.resource: each for each in overrides.get() if each.resource in plan.resources}
    overridden(plan, {**around, override.resource: override})


def given(found: Overrides) -> dict[Resource[Any], Any]:
    """Return the ready-made values."""
    return {resource: each.value for resource, each in found.items() if each.value is not MISSING}
