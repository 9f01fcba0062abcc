"""The benchmarks run, and their table says what they found; how fast is never asserted here."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import pytest

from . import __main__ as command
from .measure import Row, paired_ratio, table
from .test_peers import CONTESTS

BARRED = {
    "critical-path": "critical path (asyncio)",
    "many": "idle resources: parked tasks, an event each (asyncio)",
    "growth": "each resource, 2 -> 4 (asyncio, gc on)",
    "workers": "workers: parked tasks, an event each (asyncio)",
    "blocks": "a block with 3 workers: without (asyncio)",
    "until": "until(), each item: a loop without (asyncio)",
    "get": "handle.get(): an attribute",
    "acquire": "acquire, SELECT 1, release",
    "import": "import lifekit",
    "memory": "memory of a live resource",
    "request": "request with Depends(handle)",
    "supervised": "request with health, notice and renewal",
    "redis": "a sandboxed test of one Redis command",
}


@pytest.fixture(autouse=True)
def heap_of_the_test_run() -> Iterator[None]:
    """Keep the rest of the test run out of the many collections that benchmarks ask for."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_benchmark_has_an_expected_row() -> None:
    """No benchmark is added or lost without this module being told."""
    assert set(command.BENCHMARKS) == {*BARRED, "sandbox", "suites", *CONTESTS}


@pytest.mark.long  # whole runs of pytest
def test_benchmarks_of_isolation_have_their_bars() -> None:
    """What a block costs at both places; the two kinds of fixtures beside the plugin."""
    rows = command.BENCHMARKS["sandbox"].tiny() + command.BENCHMARKS["suites"].tiny()
    in_block = ["query", "insert", "statement", "transaction", "rows", "thread"]
    suites = ["suite/function-scoped", "suite/session-scoped"]
    assert [row.key for row in rows if row.has_bar] == [
        *(f"sandbox/{key}" for key in in_block),
        *suites,
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", BARRED)
def test_a_benchmark_gives_one_row_with_a_bar_and_positive_ratios(name: str) -> None:
    """Each benchmark measures something, and holds exactly one of its rows to a bar."""
    rows = command.BENCHMARKS[name].tiny()
    assert [BARRED[name] in row.what for row in rows if row.has_bar] == [True]
    for row in rows:
        assert min(row.floor, row.ours, row.ratio) > 0
        assert max(row.floor, row.ours, row.ratio) < math.inf


def test_the_table_has_a_line_for_every_row() -> None:
    """Floor, ours, ratio, bar and verdict stand in one line each, under a header and a rule."""
    rows = [
        Row("slow", 0.1, 0.2, 2.0, "ms", most=1.05),
        Row("fast", 1e-6, 1.4e-6, 1.4, "us", most_more=0.5e-6),
        Row("known", 100, 300, 3.0, "B"),
    ]
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines[2:] == [
        ["slow", "100.0", "ms", "200.0", "ms", "2.000", "1.05", "x", "NOT", "MET"],
        ["fast", "1.00", "µs", "1.40", "µs", "1.400", "+0.50", "µs", "met"],
        ["known", "100", "B", "300", "B", "3.000"],
    ]


def test_a_ratio_of_pairs_ignores_a_host_that_gets_slower() -> None:
    """Each round is held against its neighbour; one outlier moves nothing."""
    assert paired_ratio([1.0, 2.0, 4.0, 1.0], [1.5, 3.0, 6.0, 90.0]) == 1.5


@pytest.mark.parametrize(
    ("ours", "arguments", "status"),
    [(1.0, ["--check"], 0), (3.0, ["--check"], 1), (3.0, [], 0)],
)
def test_only_check_turns_a_missed_bar_into_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: float,
    arguments: list[str],
    status: int,
) -> None:
    """Without ``--check`` a slow host fails nothing; the table comes either way."""

    def measured() -> list[Row]:
        return [Row("the thing", 1.0, ours, ours, "ms", most=2.0)]

    monkeypatch.setitem(command.BENCHMARKS, "get", command.Benchmark(measured, measured))
    assert command.main(["get", *arguments]) == status
    assert "the thing" in capsys.readouterr().out


def test_an_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error is told before anything is measured."""
    with pytest.raises(SystemExit):
        command.main(["gets"])
    assert "critical-path, many" in capsys.readouterr().err
