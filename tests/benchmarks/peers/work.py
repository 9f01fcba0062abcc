"""The work that is the same for every contestant: a route to answer, a graph to open and close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Log = list["Pool"]

# -- a request -----------------------------------------------------------------------------------


class Pool:
    """What lives as long as the application, and counts what was made of it."""

    def __init__(self) -> None:
        self.name = "pool"
        self.is_open = True
        self.repos = 0
        self.services = 0


class Repo:
    """What a request has of its own."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        pool.repos += 1


class Service:
    """What a request has of its own, too, and what its route asks for."""

    def __init__(self, repo: Repo) -> None:
        self.repo = repo
        repo.pool.services += 1


async def open_pool(log: Log) -> AsyncGenerator[Pool, None]:
    """Open a pool, put it into *log*, and close it."""
    pool = Pool()
    log.append(pool)
    yield pool
    pool.is_open = False


opened_pool = asynccontextmanager(open_pool)


# -- a graph -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Node:
    """A resource: its type, and what it is made of."""

    name: str
    kind: type[Any]
    needs: tuple[Node, ...]


class Made:
    """The base of the values in a graph; each node has a type of its own."""

    def __init__(self, *needs: object) -> None:
        self.needs = needs


@dataclass
class Plan:
    """Resources in layers, each made of two of the layer before; opening and closing take time."""

    count: int = 40
    depth: int = 4
    seconds: float = 0.0
    events: list[tuple[str, Node]] = field(default_factory=list[tuple[str, Node]])
    nodes: list[Node] = field(init=False, default_factory=list[Node])
    last: list[Node] = field(init=False, default_factory=list[Node])

    def __post_init__(self) -> None:
        for layer in range(self.depth):
            before = self.last
            self.last = [
                Node(name, type(name.title(), (Made,), {}), (before[index], before[index - 1]))
                if before
                else Node(name, type(name.title(), (Made,), {}), ())
                for index in range(self.count // self.depth)
                for name in [f"r{layer}x{index}"]
            ]
            self.nodes += self.last

    async def open(self, node: Node, needs: Sequence[object]) -> Any:
        """Open one resource of what it needs."""
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.events.append(("open", node))
        return node.kind(*needs)

    async def close(self, node: Node) -> None:
        """Close one resource."""
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.events.append(("close", node))

    def factory(self, node: Node) -> Callable[..., AsyncGenerator[Any, None]]:
        """Return the resource as a function that yields it, annotated with the types."""

        async def leaf() -> AsyncGenerator[Any, None]:
            yield await self.open(node, ())
            await self.close(node)

        async def made(first: Any, second: Any) -> AsyncGenerator[Any, None]:
            yield await self.open(node, (first, second))
            await self.close(node)

        function: Callable[..., AsyncGenerator[Any, None]] = made if node.needs else leaf
        kind: Any = node.kind
        kinds = (need.kind for need in node.needs)
        function.__annotations__ = {
            **dict(zip(("first", "second"), kinds, strict=False)),
            "return": AsyncGenerator[kind, None],
        }
        function.__name__ = function.__qualname__ = node.name
        return function
