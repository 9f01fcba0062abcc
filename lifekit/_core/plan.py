"""The plan: declarations checked and linked, by code without I/O, before anything opens."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import DeclarationError
from .resource import Resource
from .worker import Worker


@dataclass(frozen=True, slots=True)
class Plan:
    """Resources in declaration order; per resource the positions of what it waits for.

    What runs for a resource is its own declaration, or the one that overrides it.
    """

    resources: tuple[Resource[Any], ...]
    declarations: tuple[Resource[Any], ...]
    parents: tuple[tuple[int, ...], ...]
    children: tuple[tuple[int, ...], ...]


def plan(
    registry: str,
    resources: Iterable[Resource[Any]],
    replaced: Mapping[Resource[Any], Resource[Any]] | None = None,
) -> Plan:
    """Check the declarations of *registry*, some of them *replaced*, and link them.

    Raises:
        DeclarationError: A duplicate name, a handle that is not among them, or a cycle.
    """
    ordered = tuple(dict.fromkeys(resources))
    refuse_duplicates(ordered)
    declarations = tuple((replaced or {}).get(resource, resource) for resource in ordered)
    position = {resource: index for index, resource in enumerate(ordered)}
    parents: list[tuple[int, ...]] = []
    children: list[list[int]] = [[] for _ in ordered]
    for index, resource in enumerate(declarations):
        wanted = dict.fromkeys(resource.needs + resource.after)
        _refuse_foreign(registry, resource, [each for each in wanted if each not in position])
        parents.append(tuple(position[each] for each in wanted))
        _refuse_optional(resource, wanted)
        for parent in parents[index]:
            children[parent].append(index)
    _refuse_cycles(ordered, parents)
    return Plan(ordered, declarations, tuple(parents), tuple(map(tuple, children)))


def dependents(plan: Plan, *resources: Resource[Any]) -> set[Resource[Any]]:
    """Return *resources* and all that is built from them, directly or by others."""
    found = set(resources)
    growing = bool(found)
    while growing:
        needing = {
            each
            for each, declaration in zip(plan.resources, plan.declarations, strict=True)
            if not found.isdisjoint(declaration.needs)
        }
        growing = not needing <= found
        found |= needing
    return found


def refuse_duplicates(resources: Iterable[Resource[Any]]) -> None:
    """Raise `DeclarationError` where two different resources have the same name."""
    first: dict[str, Resource[Any]] = {}
    for resource in resources:
        if first.setdefault(resource.name, resource) is not resource:
            raise duplicate(first[resource.name], resource.name, resource.location)


def duplicate(first: Resource[Any], name: str, location: str) -> DeclarationError:
    """Return the error for a second resource called *name*, declared at *location*."""
    return DeclarationError(
        f"two resources are called {name!r}: {first.location} and {location}. "
        "Rename one, or give it name='…'."
    )


def _refuse_foreign(registry: str, resource: Resource[Any], foreign: list[Resource[Any]]) -> None:
    for other in foreign:
        raise DeclarationError(
            f"{resource.name} ({resource.location}) needs {other.name} ({other.location}), which "
            f"belongs to the registry {other.registry.name!r}, not to {registry!r}. "
            "Include that registry: registry.include(other_registry)."
        )


def _refuse_optional(resource: Resource[Any], wanted: Iterable[Resource[Any]]) -> None:
    for other in wanted:
        # Workers, which are no resources, wait for it.
        if resource.options.required and not (other.options.required or isinstance(resource, Worker)):
            raise DeclarationError(
                f"{resource.name} ({resource.location}) is required, and needs {other.name} "
                f"({other.location}), which is not: the start would wait for it. Declare both "
                f"with required=False, or {other.name} without."
            )


def _refuse_cycles(ordered: tuple[Resource[Any], ...], parents: list[tuple[int, ...]]) -> None:
    try:
        graphlib.TopologicalSorter(dict(enumerate(parents))).prepare()
    except graphlib.CycleError as error:
        # graphlib walks from a need to what needs it; people read "a needs b".
        cycle: list[int] = error.args[1]
        steps = [ordered[index] for index in reversed(cycle)]
        path = " -> ".join(f"{step.name} ({step.location})" for step in steps)
        raise DeclarationError(f"the resources need each other in a cycle: {path}") from None
