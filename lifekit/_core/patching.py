"""Overrides of a running lifespan: what they replace is built beside it, and serves for a time.

Each is a lifespan of its own, on the values of the one around it, and the innermost serves.
"""

# pyright: reportPrivateUsage=false
# It is a part of `lifespan.py`, apart from it since production never needs it.

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from .errors import OverrideError
from .lifespan import Lifespan
from .overrides import Override, given, overridden
from .plan import dependents
from .resting import acting_in, resume, suspend


@asynccontextmanager
async def patch(root: Lifespan, override: Override) -> AsyncGenerator[Lifespan]:
    """Serve what *override* gives, and what is then built from it; see `Lifespan.override`."""
    if root._engine is None or root._engine.stopping or not root._engine.ready.is_set():
        raise OverrideError(
            f"{override.location}: the lifespan made at {root.location} does not run. Enter it "
            "first; registry.override(…) is for lifespans that are opened later."
        )
    top = (root, *root.patches)[-1]
    patched = Lifespan(root.registry, top._plan, override.location, root=root)
    patched.sandboxed, patched.postgres = root.sandboxed, root.postgres
    patched._overrides = {**top._overrides, override.resource: override}
    patched._plan = overridden(root._base, patched._overrides)
    rebuilt = dependents(patched._plan, override.resource)
    patched._absent = {*patched._plan.resources} - {*top._own, *rebuilt}
    patched._own.update((each, top._own[each]) for each in top._own if each not in rebuilt)
    patched._own.update(given({override.resource: override}))
    patched._rests = acting_in(root._layers(), rebuilt)
    root.overriding.append(override.location)
    try:
        if (interrupt := await suspend(patched._rests)) is not None:
            raise interrupt
        async with patched:
            if (root, *root.patches)[-1] is not top:
                raise OverrideError(
                    f"{override.location}: another override of this lifespan began while this "
                    "one was built, and the two would not know of each other. Begin one after the "
                    "other."
                )
            _serve(root, (*root.patches, patched))
            try:
                yield patched
            finally:
                inner = root.patches[-1:] != (patched,) and patched in root.patches
                await undo(root, patched)
    finally:
        root.overriding.remove(override.location)
        await _end_rest(root, patched)
    if inner:
        raise OverrideError(
            f"the override made at {override.location} ended while one inside it was in use, which "
            "ended with it. Overrides of one lifespan end in reverse."
        )


def _serve(root: Lifespan, patches: tuple[Lifespan, ...]) -> None:
    root.patches = patches
    served = (root, *patches)
    top = served[-1]
    missing = {each.name for each in top._plan.resources if each not in top._own}
    for each in served:
        each.live, each.variables, each.missing = top._own, top._variables, missing


async def undo(root: Lifespan, patched: Lifespan) -> None:
    """End an override of *root*, and those inside it."""
    if patched not in root.patches:
        return
    at = root.patches.index(patched)
    leaving, failures = root.patches[at:], list[BaseException]()
    _serve(root, root.patches[:at])
    for each in reversed(leaving):
        each.live = each._own
        try:
            await each.__aexit__(None, None, None)
        except BaseException as error:
            failures.append(error)
        try:
            await _end_rest(root, each)
        except BaseException as error:
            failures.append(error)
    for failure in failures:
        if not isinstance(failure, Exception):
            raise failure
    if failures:
        raise failures[0]


async def _end_rest(root: Lifespan, patched: Lifespan) -> None:
    rests, patched._rests = patched._rests, {}
    if rests:
        await resume(rests, root._layers())
