"""The numbers in the documentation: `docs/benchmarks.md`, its pictures, and others' cells."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .figures import Figure, as_svg, as_table, compared, listed, overview, roughly
from .results import Results

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("benchmarks.md", "explanation/choosing-isolation.md")
CELL = re.compile(r"(<!-- bench: ([\w-]+) -->)(.*?)(<!-- /bench -->)", re.S)

NAMES = {
    "nothing": "nothing but the work",
    "by hand": "FastAPI by hand",
    "wireup, plain routes": "wireup on plain routes",
}
GRAPHS = {"nothing": "the calls alone", "by hand": "AsyncExitStack by hand"}
UNDONE = {"nothing": "no isolation"}
FIGURES = [
    Figure("request-one", "A request that gets one value", "nothing", "a request", NAMES, within=0.03),
    Figure(
        "request-chain", "A request that makes two objects", "nothing", "a request", NAMES, within=0.03
    ),
    Figure(
        "graph-idle", "40 resources that do nothing", "nothing", "start and stop", GRAPHS, within=0.1
    ),
    Figure(
        "graph-slow",
        "40 resources of 5 + 5 ms",
        "the longest path",
        "start and stop",
        GRAPHS,
        within=0.03,
    ),
    Figure("isolation", "A test on asyncpg", "nothing", "a test", UNDONE, "lifekit's sandbox", 0.05),
    Figure(
        "isolation-sqlalchemy",
        "A test on SQLAlchemy",
        "nothing",
        "a test",
        UNDONE,
        "lifekit's sandbox",
        0.05,
    ),
    Figure(
        "isolation-redis", "A test on Redis", "nothing", "a test", UNDONE, "lifekit's sandbox", 0.05
    ),
    Figure(
        "isolation-aiopg",
        "A test of an application on aiopg and Redis",
        "nothing",
        "a test",
        UNDONE,
        "lifekit's sandbox",
        0.05,
    ),
    Figure("import", "Import, with FastAPI", "FastAPI alone", "an import", within=0.01),
]


def picture(figure: Figure) -> str:
    """Return the path of a figure's picture, under the docs."""
    return f"images/bench-{figure.key}.svg"


def block(figure: Figure, results: Results) -> str:
    """Return what the page shows of a figure: who is faster, bars, a table."""
    rows = results.figure(figure.key)
    image = f"![{figure.title}: bars, the numbers of the table below]({picture(figure)})"
    return f"\n\n{compared(figure, rows)}\n\n{image}\n\n{as_table(figure, rows)}\n\n"


# -- cells ---------------------------------------------------------------------------------------


def _a_test(results: Results, key: str, side: str) -> str:
    row = results.rows[key]
    return f"{roughly((row.floor if side == 'floor' else row.ours) / row.each * 1e3)} ms"


def _more(results: Results, *names: str) -> str:
    """Return by how much ways to isolate are dearer than none."""
    found = [results.rows[f"isolation/{name}"] for name in names]
    return " to ".join(roughly(row.floor * (row.ratio - 1) * 1e3) for row in found) + " ms"


def _rate(results: Results, tables: str) -> float:
    truncate, delete = (
        results.rows[f"isolation/{statement} of {tables}"] for statement in ("TRUNCATE", "DELETE")
    )
    return (truncate.ratio - 1) / (delete.ratio - 1)


def _delete_is(results: Results) -> str:
    few, many = sorted(_rate(results, tables) for tables in ("1 table", "20 tables"))
    return f"{few:.0f} to {many:.0f} times"


def _suites(results: Results) -> str:
    rows = [results.rows[f"suite/{scope}-scoped"] for scope in ("function", "session")]
    seconds = [rows[0].floor, rows[1].floor, rows[0].ours]
    return f"{rows[0].each} tests took " + listed([f"{roughly(each)} s" for each in seconds])


def _places(results: Results) -> str:
    return f"\n\n{overview({figure: results.figure(figure.key) for figure in FIGURES})}\n\n"


def _machine(results: Results) -> str:
    cores = results.machine["cores"]
    return f"Python {results.versions['Python'].rpartition('.')[0]}, {cores} cores"


def _whole_machine(results: Results) -> str:
    there = results.machine
    named = [f"{name} {number}" for name, number in results.versions.items()]
    return f"{there['processor']}, {there['cores']} cores, {there['system']}; {', '.join(named)}."


CELLS: dict[str, Callable[[Results], str]] = {
    "session-scope": lambda found: _a_test(found, "suite/session-scoped", "floor"),
    "session-rollback": lambda found: _a_test(found, "suite/session-scoped", "floor"),
    "function-scope": lambda found: _a_test(found, "suite/function-scoped", "floor"),
    "sandbox": lambda found: _a_test(found, "suite/session-scoped", "ours"),
    "truncation": lambda found: _more(found, "TRUNCATE of 1 table", "TRUNCATE of 20 tables"),
    "delete": lambda found: _more(found, "DELETE of 1 table", "DELETE of 20 tables"),
    "delete-is": _delete_is,
    "template": lambda found: _more(found, "a database from a template"),
    "container": lambda found: f"{found.rows['server/PostgreSQL, started and stopped'].ours:.1f} s",
    "sandbox-query": lambda found: f"{found.rows['sandbox/query'].ratio:.1f} times",
    "sandbox-statement": lambda found: f"{found.rows['sandbox/statement'].ratio:.1f} times",
    "sandbox-redis": lambda found: f"{found.rows['sandbox/redis'].ratio:.1f} times",
    "suites": _suites,
    "places": _places,
    "machine": _machine,
    "whole-machine": _whole_machine,
}


def filled(text: str, results: Results) -> str:
    """Return a page with the numbers of *results* between its marks."""
    blocks = {figure.key: figure for figure in FIGURES}

    def cell(match: re.Match[str]) -> str:
        name = match[2]
        value = block(blocks[name], results) if name in blocks else CELLS[name](results)
        return f"{match[1]}{value}{match[4]}"

    return CELL.sub(cell, text)


def drawn(results: Results, docs: Path = DOCS) -> dict[Path, str]:
    """Return each file of the documentation that shows results, as it should be."""
    files = {docs / page: filled((docs / page).read_text("utf-8"), results) for page in PAGES}
    for figure in FIGURES:
        files[docs / picture(figure)] = as_svg(figure, results.figure(figure.key))
    return files


def draw(results: Results, docs: Path = DOCS) -> list[Path]:
    """Write the files that are stale, and return them."""
    stale = [
        (path, text)
        for path, text in drawn(results, docs).items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    for path, text in stale:
        path.write_text(text, "utf-8")
    return [path for path, _ in stale]
