"""What ignores even its cancellation: the run goes on without it, and cuts its value off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio import CancelScope

from lifekit._util.loops import conceal, reveal, sheltered, spawn

from .life import LAST_CALL
from .node import Node, State
from .stand_in import redact_error
from .value import Call, settle

if TYPE_CHECKING:
    from .engine import Engine  # which it is a part of


class Abandoned:
    """What one run has left behind."""

    def __init__(self, owner: Engine) -> None:
        self._owner = owner
        self._tasks: list[object] = []  # asyncio itself does not keep them

    def leave(self, node: Node) -> None:
        """Wait no more for the task of *node*."""
        owner = self._owner
        if node.left:  # its terminate hangs as well
            owner.ended(node, None)
            return
        error = owner.deadline_error(node, abandoned=True)
        if node.state is State.OPENING:
            node.opened_at = owner.now()
            owner.open_failed(node, error)
        else:
            owner.close_failed(node, (node.phase, error))
        live = node.live
        if live is None or not live.terminate or node.phase == "terminate":
            owner.ended(node, None)
        else:
            owner.terminated(node, None)
            owner.time.arm(node, 2 * LAST_CALL)
            self._tasks.append(
                spawn(
                    self._terminate(node, live.terminate),
                    f"lifekit {node.resource.name}",
                    lambda: owner.report(node, owner.ended, None),
                )
            )
            conceal(self._tasks[-1])
        node.left = True
        reveal(node.task)  # nobody waits for it any more
        node.live = live  # its task still has it, and closes it should the opening ever succeed

    async def _terminate(self, node: Node, call: Call) -> None:
        # In a task of its own: that of the resource was left behind.
        owner = self._owner
        sheltered.set(True)
        try:
            with CancelScope(shield=True, deadline=owner.now() + LAST_CALL):
                await settle(call())
        except GeneratorExit:
            raise
        except BaseException as error:
            owner.report(node, owner.close_failed, ("terminate", redact_error(error, node.live)))
        owner.report(node, owner.ended, None)
