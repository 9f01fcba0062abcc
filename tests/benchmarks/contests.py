"""lifekit beside other libraries: requests, starting and stopping, imports."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from time import perf_counter, process_time
from typing import Any

import anyio

from . import peers
from .measure import Row, Take, Unit, contest, interleave, on


async def take_turns(
    figure: str, rounds: int, takes: dict[str, Take | None], unit: Unit, *, floor: str | None = None
) -> list[Row]:
    """Measure those that are there, in turns, and return a row for each."""
    present = {name: take for name, take in takes.items() if take is not None}
    measured = await interleave(rounds, *present.values())
    costs = dict(zip(present, measured, strict=True))
    return contest(figure, {name: costs.get(name) for name in takes}, unit, floor=floor)


# -- requests ------------------------------------------------------------------------------------


def requests(case: str, *, rounds: int = 150, times: int = 50) -> list[Row]:
    """Compare requests that get ``one`` open value, or a ``chain`` of two made for it."""
    # Imported here: a bigger heap would slow every garbage collection of the other benchmarks.
    from .access import request_seconds, served

    async def measured() -> list[Row]:
        takes: dict[str, Take | None] = {}
        async with AsyncExitStack() as stack:
            for name in peers.CONTESTANTS:
                takes[name] = None
                if (module := peers.load(name)) is not None:
                    app = getattr(module, case)([])
                    state = await stack.enter_async_context(served(app))
                    takes[name] = partial(request_seconds, app, state, times)
            return await take_turns(f"request-{case}", rounds, takes, "us")

    return on("asyncio", measured)


# -- graphs --------------------------------------------------------------------------------------


def graphs(
    figure: str, *, rounds: int = 5, count: int = 40, depth: int = 4, seconds: float = 0.0
) -> list[Row]:
    """Compare declaring, opening and closing resources in layers."""
    # Waiting goes by the clock on the wall; where nothing waits, what others take does not count.
    clock = perf_counter if seconds else process_time

    async def start_and_stop(graph: Any) -> float:
        from .peers.work import Plan

        plan = Plan(count, depth, seconds)
        gc.collect()
        began = clock()
        async with graph(plan):
            pass
        took = clock() - began
        assert len(plan.events) == 2 * count
        return took

    async def critical_path() -> float:
        began = perf_counter()
        for _ in range(2 * depth):
            await anyio.sleep(seconds)
        return perf_counter() - began

    async def measured() -> list[Row]:
        takes: dict[str, Take | None] = {"the longest path": critical_path} if seconds else {}
        for name in peers.CONTESTANTS:
            module = peers.load(name)
            if module is None:
                takes[name] = None
            elif hasattr(module, "graph") and not (seconds and name == peers.FLOOR):
                takes[name] = partial(start_and_stop, module.graph)
        return await take_turns(figure, rounds, takes, "ms")

    return on("asyncio", measured)


# -- imports -------------------------------------------------------------------------------------

IMPORTS = {
    # The modules, too, that it leaves for the first lifespan.
    "lifekit": "from lifekit import Registry, _core, events; from lifekit._core import engine",
    "svcs": "import svcs.fastapi",
    "dishka": "import dishka.integrations.fastapi",
    "wireup": "import wireup.integration.fastapi",
    "dependency-injector": "import dependency_injector.ext.starlette, dependency_injector.wiring",
    "that-depends": "import that_depends",
}
TIMED_IMPORT = """
from time import perf_counter
began = perf_counter()
import fastapi
halfway = perf_counter()
{}
print(halfway - began, perf_counter() - halfway)
"""


def imports(*, rounds: int = 8, names: Iterable[str] = IMPORTS, own_bytecode: bool = True) -> list[Row]:
    """Compare importing FastAPI and a library with importing FastAPI alone."""

    async def measured() -> list[Row]:
        with tempfile.TemporaryDirectory(prefix="lifekit-bench-") as bytecode:
            # The first, uncounted run of each writes the bytecode of all that it imports here,
            # also where the environment forbids Python to write any.
            environment = dict(os.environ)
            if own_bytecode:
                environment["PYTHONPYCACHEPREFIX"] = bytecode
                environment.pop("PYTHONDONTWRITEBYTECODE", None)
            fastapi: dict[str, list[float]] = {}

            async def seconds(name: str) -> float:
                command = [sys.executable, "-c", TIMED_IMPORT.format(IMPORTS[name])]
                ran = await anyio.run_process(command, env=environment)
                floor, more = map(float, ran.stdout.split())
                fastapi.setdefault(name, []).append(floor)
                return floor + more

            present = [name for name in names if find_spec(peers.CONTESTANTS[name][1]) is not None]
            measured = await interleave(rounds, *(partial(seconds, name) for name in present))
        costs = dict(zip(present, measured, strict=True))
        alone = "FastAPI alone"
        (floor,) = contest(
            "import", {alone: [each for name in present for each in fastapi[name][1:]]}, "ms"
        )
        rows = [floor]
        for name in names:
            if name not in costs:
                rows += contest("import", {alone: [floor.ours], name: None}, "ms")[1:]
                continue
            # Beside FastAPI's import in the same process: no two processes are alike.
            row = contest("import", {alone: fastapi[name][1:], name: costs[name]}, "ms")[1]
            rows.append(replace(row, floor=floor.ours, ours=floor.ours * row.ratio))
        return rows

    return on("asyncio", measured)
