"""What rests for a time in a lifespan that goes on: workers between two blocks, and what an override of
a running lifespan replaces, as far as that would go on working by itself.

A lifespan with overrides is a pile of layers, each a run of its own: the first is its own, each other
holds what an override rebuilt. What rests is ended, and later it is opened or begun anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any

from lifekit._util.loops import contexts_of_tasks, sit_out

from .errors import OverrideError
from .node import RUNNING, Node, State, belongs_to
from .plan import dependents
from .resource import Resource

if TYPE_CHECKING:
    from .engine import Engine  # in which they rest

Some = dict["Engine", set[Resource[Any]]]
"""Resources and workers, by the layer that owns them."""


def crew_of(layers: Sequence[Engine]) -> Some:
    """Return the workers, each in the innermost layer that has it."""
    found: Some = {}
    seen: set[Resource[Any]] = set()
    for layer in reversed(layers):
        if mine := layer.crew - seen:
            found[layer] = mine
            seen |= mine
    return found


def acting_in(layers: Sequence[Engine], rebuilt: set[Resource[Any]]) -> Some:
    """Return what of *rebuilt* would go on working, and what else of it needs that.

    That is what a worker is, or has tasks of its own; but for the values that a driver knows, whose
    tasks only serve who uses them.
    """
    contexts = list(contexts_of_tasks())
    acting = {
        node.resource
        for layer in layers
        for node in layer.own
        if node.resource in rebuilt and node.state in RUNNING and _acts(node, contexts)
    }
    acting = dependents(layers[-1].plan, *acting)
    found: Some = {}
    for layer in reversed(layers):
        running = {node.resource for node in layer.own if node.state in RUNNING}
        if mine := running & acting:
            found[layer] = mine
    return found


def _acts(node: Node, contexts: Sequence[tuple[object, Context]]) -> bool:
    if node.worker is not None:  # also one that still ends for a renewal: the next one would begin
        return True
    if node.state is not State.OPEN or node.live is None or node.live.driver is not None:
        return False
    return any(context.get(belongs_to) is node and task is not node.task for task, context in contexts)


async def suspend(some: Some) -> BaseException | None:
    """End these, innermost layer first; return what is to be raised when they are resumed.

    Nothing cuts it off, for what has begun to end must be resumed.
    """
    interrupt: BaseException | None = None
    for layer, resources in some.items():
        interrupt = await sit_out(layer.pauses.begin(resources)) or interrupt
    return interrupt


async def resume(some: Some, layers: Sequence[Engine]) -> None:
    """Open or begin these anew, outermost layer first, and let the other layers have the new values.

    Raises:
        OverrideError: Something did not open again, so that its lifespan ends; that says why.
    """
    interrupt: BaseException | None = None
    for layer in reversed(some):
        interrupt = await sit_out(layer.pauses.end(some[layer])) or interrupt
        for inner in layers:
            if inner is not layer:
                owned = {node.resource for node in inner.own}
                for each in some[layer] & layer.values.keys() & inner.values.keys() - owned:
                    inner.values[each] = layer.values[each]
        if layer.open_failures and interrupt is None:
            names = ", ".join(name for name, _, _ in layer.open_failures)
            interrupt = OverrideError(
                f"{names} of {layer.name} had been closed for an override, and did not open again: the "
                "lifespan ends, and raises why"
            )
    if interrupt is not None:
        raise interrupt
