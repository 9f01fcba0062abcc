"""`python -m tests.benchmarks [--check] [--save | --draw] [name ...]`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from . import contests, page, per_test, results
from .access import acquire, get, request, supervised
from .footprint import imports, memory
from .gateway import gateway
from .isolation import redis_isolation, suites
from .measure import Row, table
from .start_stop import critical_path, growth, many
from .workers import blocks, until, workers


class Benchmark(NamedTuple):
    """One comparison, in full, and so small that it only shows that it runs."""

    full: Callable[[], list[Row]]
    tiny: Callable[[], list[Row]]


BENCHMARKS = {
    "critical-path": Benchmark(
        critical_path, partial(critical_path, rounds=1, count=4, depth=2, seconds=0.001)
    ),
    "many": Benchmark(many, partial(many, rounds=1, count=5)),
    "growth": Benchmark(growth, partial(growth, rounds=1, small=2, big=4)),
    "workers": Benchmark(workers, partial(workers, rounds=1, count=3)),
    "blocks": Benchmark(blocks, partial(blocks, rounds=1)),
    "until": Benchmark(until, partial(until, rounds=1, items=100)),
    "get": Benchmark(get, partial(get, rounds=1, times=10)),
    "acquire": Benchmark(acquire, partial(acquire, rounds=1, times=1)),
    "sandbox": Benchmark(gateway, partial(gateway, rounds=1, times=1)),
    "redis": Benchmark(redis_isolation, partial(redis_isolation, rounds=1, times=1)),
    "suites": Benchmark(suites, partial(suites, rounds=1, tests=2)),
    "import": Benchmark(imports, partial(imports, rounds=1)),
    "memory": Benchmark(memory, partial(memory, rounds=1, count=200)),
    "request": Benchmark(request, partial(request, rounds=1, times=2)),
    "supervised": Benchmark(supervised, partial(supervised, rounds=1, times=2)),
    "isolation": Benchmark(per_test.postgres, partial(per_test.postgres, rounds=1, few=1)),
    "isolation-sqlalchemy": Benchmark(
        per_test.sqlalchemy, partial(per_test.sqlalchemy, rounds=1, few=1)
    ),
    "isolation-redis": Benchmark(per_test.valkey, partial(per_test.valkey, rounds=1, few=1)),
    "isolation-aiopg": Benchmark(per_test.users, partial(per_test.users, rounds=1, few=1)),
    "server": Benchmark(per_test.servers, partial(per_test.servers, rounds=1)),
    "import-peers": Benchmark(
        contests.imports, partial(contests.imports, rounds=1, names=["lifekit"], own_bytecode=False)
    ),
    "graph-idle": Benchmark(
        partial(contests.graphs, "graph-idle", rounds=15),
        partial(contests.graphs, "graph-idle", rounds=1, count=4, depth=2),
    ),
    "graph-slow": Benchmark(
        partial(contests.graphs, "graph-slow", seconds=0.005),
        partial(contests.graphs, "graph-slow", rounds=1, count=4, depth=2, seconds=0.001),
    ),
    "request-one": Benchmark(
        partial(contests.requests, "one"), partial(contests.requests, "one", rounds=1, times=2)
    ),
    "request-chain": Benchmark(
        partial(contests.requests, "chain"), partial(contests.requests, "chain", rounds=1, times=2)
    ),
}
"""By name, in the order they run: what makes the heap bigger comes last."""

SAVED = ("sandbox", "redis", "suites", *list(BENCHMARKS)[list(BENCHMARKS).index("isolation") :])
"""Those that the documentation shows."""


def draw(found: results.Results, docs: Path) -> int:
    """Write what the documentation shows of results, say what was stale, and return 0."""
    for path in page.draw(found, docs):
        print(f"wrote {path.relative_to(docs.parent)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named, or all, print their table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--tiny", action="store_true", help="only show that all of them run")
    parser.add_argument(
        "--save", action="store_true", help="run what the documentation shows; save and draw it"
    )
    parser.add_argument("--draw", action="store_true", help="run nothing; draw what was saved")
    parser.add_argument("--results", type=Path, default=results.SAVED, help=argparse.SUPPRESS)
    parser.add_argument("--docs", type=Path, default=page.DOCS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if options.draw:
        return draw(results.load(options.results), options.docs)
    chosen = options.names or (SAVED if options.save else BENCHMARKS)
    rows: list[Row] = []
    for name, benchmark in BENCHMARKS.items():
        if name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += benchmark.tiny() if options.tiny else benchmark.full()
    packages = " ".join(f"{each} {version(each)}" for each in ("anyio", "fastapi", "uvloop", "trio"))
    print(f"Python {platform.python_version()} {packages}\n\n{table(rows)}")
    if options.save:
        draw(results.save(rows, options.results), options.docs)
    missed = [row.what for row in rows if not row.met]
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
