"""The nodes of one run: one that stands for each resource now, and others whose life still goes on."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence
from typing import Any

from .node import RUNNING, Node
from .plan import Plan
from .resource import Resource
from .view import View


class Nodes(View):
    """A run whose nodes may be replaced by others: by another attempt, or by a renewal."""

    def __init__(
        self, plan: Plan, values: dict[Resource[Any], Any], absent: Collection[Resource[Any]]
    ) -> None:
        self.plan, self.values = plan, values
        elsewhere = {*absent, *values}
        self.nodes = [self._node(index) for index in range(len(plan.resources))]
        self.own = [node for node in self.nodes if node.resource not in elsewhere]
        self.crew = {node.resource for node in self.own if node.worker is not None}
        values.update((node.resource, node.worker) for node in self.own if node.worker is not None)
        self.stand(self.nodes, values)
        self.absent = [node for node in self.nodes if node.resource in absent]

    def _node(self, index: int) -> Node:
        return Node(self.plan.resources[index], self.plan.declarations[index], index)

    def stand(self, nodes: Sequence[Node], values: dict[Resource[Any], Any]) -> None:
        """Let *nodes*, which are new, stand on each other and on what there is, and fill *values*."""
        new = {node.index: node for node in nodes}
        for node in nodes:
            parents = self.plan.parents[node.index]
            node.stand_on((new.get(at) or self.nodes[at] for at in parents), values)

    def anew(self, old: Node) -> Node:
        """Return a node that is to do once more what *old* did."""
        node = self._node(old.index)
        insort(self.own, node, key=lambda each: each.index)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let *new* stand for its resource from now on."""
        self.start_times = self.start_times or self.opening_times()
        self.nodes[new.index] = new
        old.hand_over(new)
        if old.state not in RUNNING:
            self.forget(old)

    def forget(self, node: Node) -> None:
        """Drop a node whose life is over, or does not begin."""
        self.own.remove(node)
        for parent in node.parents:
            parent.children.pop(node, None)
