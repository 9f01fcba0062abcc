"""A graph of what needs what, drawn from above: each thing below all that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product

from .svg import BLUE, LETTER, WIDTH, number, picture, text

LAYER = 66
BOX = 28


@dataclass(frozen=True)
class Edge:
    """From what opens first to what waits for it; *ordered* if no value is passed."""

    above: str
    below: str
    ordered: bool = False


def draw(name: str, title: str, nodes: Sequence[str], edges: Sequence[Edge]) -> str:
    """Return the picture of a graph whose *nodes* come in an order in which they could open."""
    layers, routes = _layers(nodes, edges)
    places = {
        node: (WIDTH * (index + 1) / (len(layer) + 1), 6 + LAYER * depth)
        for depth, layer in enumerate(_untangled(layers, routes))
        for index, node in enumerate(layer)
    }
    tip = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"'
    body = [
        f'<defs><marker id="{name}-tip" {tip}><path d="M0 0 L10 5 L0 10 z"/></marker></defs>',
        *(_line(name, edge, [places[each] for each in route]) for edge, route in routes.items()),
        *(line for node in nodes for line in _box(node, *places[node])),
    ]
    height = LAYER * (len(layers) - 1) + BOX + 12.0
    if any(edge.ordered for edge in edges):
        body.append(text(4, height + 18, "solid: gets its value · dashed: only waits for it"))
        height += 28
    return picture(name, height, title, _told(nodes, edges), body)


def _told(nodes: Sequence[str], edges: Sequence[Edge]) -> str:
    sentences: list[str] = []
    for node in nodes:
        needs = [edge.above for edge in edges if edge.below == node and not edge.ordered]
        after = [edge.above for edge in edges if edge.below == node and edge.ordered]
        words = [f"needs {' and '.join(needs)}"] if needs else []
        words += [f"waits for {' and '.join(after)}"] if after else []
        sentences.append(f"{node} {', and '.join(words) or 'needs nothing'}.")
    return " ".join(sentences)


def _layers(
    nodes: Sequence[str], edges: Sequence[Edge]
) -> tuple[list[list[str]], dict[Edge, list[str]]]:
    """Return the nodes by depth, with a place for each edge that passes, and each edge's way."""
    depth: dict[str, int] = {}
    for node in nodes:
        above = [depth[edge.above] + 1 for edge in edges if edge.below == node]
        depth[node] = max(above, default=0)
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in nodes:
        layers[depth[node]].append(node)
    routes: dict[Edge, list[str]] = {}
    for edge in edges:
        passed = range(depth[edge.above] + 1, depth[edge.below])
        through = [f"{edge.above} to {edge.below} at {layer}" for layer in passed]
        for layer, place in zip(passed, through, strict=True):
            layers[layer].append(place)
        routes[edge] = [edge.above, *through, edge.below]
    return layers, routes


def _untangled(layers: list[list[str]], routes: Mapping[Edge, list[str]]) -> list[list[str]]:
    """Return the layers in the order in which the fewest lines cross, and those are shortest."""
    steps = [step for route in routes.values() for step in pairwise(route)]

    def tangle(ordered: Iterable[Sequence[str]]) -> tuple[int, float]:
        at = {
            node: (index + 1) / (len(layer) + 1)
            for layer in ordered
            for index, node in enumerate(layer)
        }
        depth = {node: index for index, layer in enumerate(layers) for node in layer}
        crossings = sum(
            (at[a] - at[c]) * (at[b] - at[d]) < 0
            for a, b in steps
            for c, d in steps
            if depth[a] == depth[c]
        )
        return crossings, sum((at[a] - at[b]) ** 2 for a, b in steps)

    return [list(layer) for layer in min(product(*map(permutations, layers)), key=tangle)]


def _line(name: str, edge: Edge, places: Sequence[tuple[float, float]]) -> str:
    dashes = ' stroke-dasharray="5 4"' if edge.ordered else ""
    return (
        f'<path d="{" ".join(_steps(places))}" fill="none" stroke="currentColor" stroke-width="1.5"'
        f'{dashes} marker-end="url(#{name}-tip)"/>'
    )


def _steps(places: Sequence[tuple[float, float]]) -> Iterator[str]:
    yield f"M{number(places[0][0])} {number(places[0][1] + BOX)}"
    for index, ((x0, y0), (x1, y1)) in enumerate(pairwise(places)):
        middle = number((y0 + BOX + y1) / 2)
        yield f"C{number(x0)} {middle} {number(x1)} {middle} {number(x1)} {number(y1)}"
        if index < len(places) - 2:
            yield f"V{number(y1 + BOX)}"


def _box(node: str, x: float, y: float) -> Iterator[str]:
    width = LETTER * len(node) + 20
    yield (
        f'<rect x="{number(x - width / 2)}" y="{number(y)}" width="{number(width)}" height="{BOX}"'
        f' rx="6" fill="{BLUE}" fill-opacity="0.15" stroke="{BLUE}" stroke-width="1.5"/>'
    )
    yield text(x, y + 18, node, more=' text-anchor="middle"', code=True)
