"""What blocks the event loop answers for it; nobody else loses time by it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Generator
from functools import partial
from typing import Any

import anyio
import pytest

from lifekit import DeadlineError, Registry, events

from . import virtual_time
from .virtual_time import block

in_virtual_time = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Story:
    """A registry with a neighbor that takes its time, and what became of it."""

    def __init__(self, **options: Any) -> None:
        self.heard: list[events.Event] = []
        self.registry = Registry("shop", on_event=self.heard.append, **options)
        self.saved = 0
        self.registry.resource(name="neighbor")(self._neighbor)

    async def _neighbor(self) -> AsyncGenerator[str]:
        await anyio.sleep(0.75)
        yield "neighbor"
        await anyio.sleep(0.75)
        self.saved += 1

    async def failures(self) -> list[DeadlineError]:
        """Run it, and return what it failed with."""
        failed: list[DeadlineError] = []
        try:
            async with self.registry.lifespan():
                pass
        except* DeadlineError as group:
            failed += [error for error in group.exceptions if isinstance(error, DeadlineError)]
        return failed


def generator(opening: float = 0.0, closing: float = 0.0) -> Generator[int]:
    """Block while it opens, and while it closes."""
    block(opening)
    yield 1
    block(closing)


async def async_generator(opening: float = 0.0, closing: float = 0.0) -> AsyncGenerator[int]:
    """Likewise, amid other steps."""
    await anyio.sleep(0.25)
    block(opening)
    await anyio.sleep(0)  # noqa: ASYNC115
    yield 1
    await anyio.sleep(0.25)
    block(closing)
    await anyio.sleep(0)  # noqa: ASYNC115


approx: Any = partial(pytest.approx, abs=0.2)
KINDS = [generator, async_generator]


@in_virtual_time
@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_within_its_own_limit_makes_nobody_late(backend: str, kind: Any) -> None:
    story = Story(start_timeout=1, close_timeout=1, grace=9)
    make = partial(kind, opening=5, closing=5)
    story.registry.resource(name="blocker", start_timeout=9, close_timeout=9)(make)

    async def main() -> None:
        assert [str(error) for error in await story.failures()] == []

    virtual_time.run(main, backend)
    assert story.saved == 1


@in_virtual_time
@pytest.mark.parametrize("kind", KINDS)
def test_a_closing_that_blocks_for_too_long_is_told_of_by_name_and_its_neighbor_is_not(
    backend: str, kind: Any
) -> None:
    story = Story(close_timeout=1, grace=2)
    story.registry.resource(name="blocker")(partial(kind, closing=5))

    async def main() -> None:
        (error,) = await story.failures()
        assert (error.resource, error.phase, error.seconds) == ("blocker", "close", approx(1))
        assert error.blocked == approx(5)
        first, second = str(error).splitlines()[:2]
        assert "test_blocked_loops.py" in first
        assert "close took longer than 1 s, and blocked the event loop for 5 s" in first
        assert "asyncio.to_thread" in second

    virtual_time.run(main, backend)
    assert story.saved == 1


@in_virtual_time
@pytest.mark.parametrize("kind", KINDS)
def test_an_opening_that_blocks_for_too_long_fails_as_an_opening_and_alone(
    backend: str, kind: Any
) -> None:
    story = Story(start_timeout=1)
    story.registry.resource(name="blocker")(partial(kind, opening=5))

    async def main() -> None:
        (error,) = await story.failures()
        assert (error.resource, error.phase, error.blocked) == ("blocker", "open", approx(5))
        assert "check" not in str(error).partition("\n")[0]

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_check_that_blocks_for_too_long_fails_as_a_check(backend: str) -> None:
    story = Story(start_timeout=1)
    story.registry.resource(name="blocker", check=lambda _: block(5))(generator)

    async def main() -> None:
        (error,) = await story.failures()
        assert (error.resource, error.phase) == ("blocker", "check")

    virtual_time.run(main, backend)


@in_virtual_time
def test_what_blocks_and_is_no_resource_makes_nobody_late(backend: str) -> None:
    story = Story(start_timeout=1, close_timeout=1, grace=1)

    async def blocking() -> None:
        for _ in range(4):
            await anyio.sleep(0.25)
            block(5)

    async def main() -> None:
        for _ in range(2):  # while it starts, and while it stops
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(blocking)
                assert [str(error) for error in await story.failures()] == []

    virtual_time.run(main, backend)
    assert story.saved == 2


@in_virtual_time
def test_a_deadline_still_counts_what_is_not_blocked(backend: str) -> None:
    story = Story()
    registry = story.registry
    registry.resource(name="blocker", start_timeout=9)(partial(generator, opening=5))

    @registry.resource(start_timeout=2)
    async def hanging() -> None:
        await anyio.sleep_forever()

    async def main() -> None:
        (error,) = await story.failures()
        assert (error.resource, error.blocked) == ("hanging", 0)
        (failed,) = [each for each in story.heard if isinstance(each, events.OpenFailed) and each.error]
        assert failed.seconds == approx(7)

    virtual_time.run(main, backend)


@in_virtual_time
def test_a_long_block_is_told_of_with_its_line_though_it_breaks_no_deadline(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    story = Story()
    story.registry.resource(name="blocker")(partial(async_generator, opening=2, closing=3))
    story.registry.resource(name="brief")(partial(async_generator, opening=0.25))

    async def main() -> None:
        await story.failures()

    with caplog.at_level(logging.INFO, "lifekit"):
        virtual_time.run(main, backend)
    opening, closing = [event for event in story.heard if isinstance(event, events.Blocked)]
    assert (opening.resource, opening.phase, opening.seconds) == ("blocker", "open", approx(2))
    assert (closing.resource, closing.phase, closing.seconds) == ("blocker", "close", approx(3))
    assert "async_generator" in opening.line
    lines = [record for record in caplog.records if "blocked" in record.getMessage()]
    assert [record.levelname for record in lines] == ["INFO", "WARNING"]
    assert (
        lines[1].getMessage() == f"blocker blocked the event loop for 3.00 s in close: {closing.line}"
    )


@in_virtual_time
def test_a_listener_that_blocks_is_told_of_and_makes_nobody_late(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    def listen(event: events.Event) -> None:
        if isinstance(event, events.Opening):
            block(5)

    registry = Registry("shop", on_event=listen, start_timeout=1)
    for name in ("a", "b"):
        registry.resource(name=name)(partial(async_generator))

    async def main() -> None:
        async with registry.lifespan():
            pass

    virtual_time.run(main, backend)
    assert set(caplog.messages) == {"on_event of shop blocked the event loop for 5.00 s"}


@in_virtual_time
def test_a_retry_has_the_time_that_others_took(backend: str) -> None:
    registry = Registry(start_timeout=2)
    attempts: list[int] = []

    @registry.resource(retry=2)
    async def flaky() -> int:
        attempts.append(1)
        await anyio.sleep(0.2)  # with the longest delays 0.9 s
        if len(attempts) < 3:
            raise ConnectionRefusedError
        return 1

    registry.resource(name="blocker", start_timeout=9)(partial(async_generator, opening=5))

    async def main() -> None:
        async with registry.lifespan():
            pass

    virtual_time.run(main, backend)
    assert len(attempts) == 3
