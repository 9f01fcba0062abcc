"""The doors of clients of PostgreSQL: open while a sandboxed lifespan runs, and gone afterwards.

So a connection that a factory, a route or a library makes by itself is undone as well. Whose gateway
it goes by, its context tells: that of a block, or of a lifespan. Code without one, as in a thread of an
executor, belongs to the sandboxed lifespan of this process.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from lifekit._core.block import current_block, refuse_stragglers
from lifekit._core.errors import SandboxUnsupportedError
from lifekit._core.running import current
from lifekit.drivers._doors import DOORS, Door, chosen, doors

if TYPE_CHECKING:
    from .postgres.sandbox import PostgresSandbox  # which opens them

_lock = threading.RLock()
_sandboxes: list[PostgresSandbox] = []
_originals: dict[str, tuple[Door, Any]] = {}
"""By package: what is a door now, and what stood there."""


def open_doors(sandbox: PostgresSandbox) -> None:
    """Let what connects from now on ask for its gateway, and remember one who has one."""
    with _lock:
        if sandbox not in _sandboxes:
            _sandboxes.append(sandbox)
        if _imports not in sys.meta_path:
            sys.meta_path.insert(0, _imports)
        for package, door in doors(_originals):
            # Of the owner itself: a class method is to be put back as one.
            own = cast("dict[str, Any]", vars(door.owner))
            original = own[door.name]
            _originals[package] = door, original
            setattr(door.owner, door.name, door.through(original, here))


def close_doors(sandbox: PostgresSandbox) -> None:
    """Forget one; with the last one all is put back."""
    with _lock:
        _sandboxes[:] = [each for each in _sandboxes if each is not sandbox]
        if _sandboxes:
            return
        while _originals:
            _, (door, original) = _originals.popitem()
            setattr(door.owner, door.name, original)
        if _imports in sys.meta_path:
            sys.meta_path.remove(_imports)


def here(host: object = "", port: object = "") -> PostgresSandbox | None:
    """Return the sandbox by whose gateway the calling code connects to a server.

    It is None where the code is outside of all, and where the address is a gateway's already.

    Raises:
        SandboxEscapedError: The code was started in a block that has ended.
        SandboxUnsupportedError: It may belong to one of several blocks.
    """
    if any(each.leads_here(host, port) for each in _sandboxes):
        return None
    by_value = chosen.get()
    if by_value is not None:
        return next((each for each in _sandboxes if each is by_value), None)
    if (block := current_block.get()) is not None:
        refuse_stragglers("a new connection")
        return next((each for each in _sandboxes if each is block.lifespan.postgres), None)
    for lifespan in current.get():
        if lifespan.postgres in _sandboxes and lifespan.process == os.getpid():
            return next(each for each in _sandboxes if each is lifespan.postgres)
        runs = lifespan in lifespan.registry.running.get(lifespan.loop, ())
        if runs and not lifespan.sandboxed:
            return None
    running = [each for each in _sandboxes if each.process == os.getpid()]
    in_block = [each for each in running if each.is_open]
    if len(in_block) > 1:
        raise SandboxUnsupportedError(
            f"a new connection, made by code without a context while {len(in_block)} sandboxes are "
            "open: in which of them it belongs can't be told. Start its thread by asyncio.to_thread or "
            "anyio.to_thread.run_sync, which hand the context on."
        )
    return next(iter(in_block or running), None)


class _Imports:
    """A finder of modules that finds what others do; it opens the door of what is imported then."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of those packages as Python does."""
        if name not in DOORS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_open(module: ModuleType) -> None:
                execute(module)
                with _lock:
                    for each in _sandboxes[:1]:
                        open_doors(each)

            loader.exec_module = execute_and_open
        return spec


_imports: Any = _Imports()
