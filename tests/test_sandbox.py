"""Blocks: what a lifespan begins and undoes, in which order, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from lifekit import (
    Driver,
    Lifespan,
    Registry,
    SandboxBusyError,
    SandboxError,
    SandboxEscapedError,
    SandboxUnsupportedError,
    drivers,
)
from lifekit._core.block import refuse_stragglers
from lifekit._core.drivers import _registered  # pyright: ignore[reportPrivateUsage]
from lifekit.drivers import Sandbox
from lifekit.testing import sandboxing

from .virtual_time import run

pytestmark = pytest.mark.anyio


class Table:
    """A value whose rows a sandbox can take back."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.rows: list[int] = []
        self.fails: dict[str, BaseException] = {}
        self.hangs = False
        self.is_quick = False


class TableSandbox(Sandbox):
    """Takes back what was added to a table."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.before: list[list[int]] = []

    def note(self, what: str) -> None:
        """Log a step, and fail if it is meant to."""
        self.table.log.append(f"{what} {self.table.name}")
        if what in self.table.fails:
            raise self.table.fails[what]

    async def begin(self) -> None:
        """Keep what is there."""
        self.before.append(list(self.table.rows))
        self.note("begin")

    async def end(self) -> None:
        """Put it back."""
        if self.table.hangs:
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        self.table.rows = self.before.pop()
        self.note("end")

    def end_at_once(self) -> bool:
        """Put it back without waiting, where that can be done."""
        if self.table.is_quick:
            self.table.rows = self.before.pop()
            self.note("end at once")
        return self.table.is_quick

    async def close(self) -> None:
        """Give up."""
        self.note("give up")

    def terminate(self) -> None:
        """Cut off."""
        self.note("cut off")


class TableDriver(Driver[Table]):
    """Tables have a sandbox."""

    async def open(self, value: Table) -> Table:
        """Open it."""
        value.log.append(f"open {value.name}")
        return value

    def close(self, value: Table) -> None:
        """Close it."""
        value.log.append(f"close {value.name}")

    def sandbox(self, value: Table) -> Sandbox:
        """Return what takes its rows back."""
        return TableSandbox(value)


@pytest.fixture(autouse=True)
def driven() -> Iterator[None]:
    """Tables have their driver."""
    drivers.register(Table, TableDriver())
    yield
    del _registered[Table]


class Shop:
    """A registry of two tables, the second made of the first."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.registry = registry = Registry("shop")

        @registry.resource
        def users() -> Table:
            return Table("users", self.log)

        @registry.resource(users)
        def orders(users: Table) -> Table:
            return Table("orders", self.log)

        self.users, self.orders = users, orders


@pytest.fixture
def shop() -> Shop:
    return Shop()


def taken(log: list[str]) -> list[str]:
    """Return what was logged, and forget it."""
    lines, log[:] = list(log), []
    return lines


async def test_what_a_block_did_is_undone_in_reverse_and_what_was_before_stays(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.users].rows.append(1)
            assert taken(shop.log) == ["open users", "open orders"]
            for _ in range(2):
                async with lifespan.sandbox():
                    assert taken(shop.log) == ["begin users", "begin orders"]
                    lifespan[shop.users].rows.append(2)
                assert taken(shop.log) == ["end orders", "end users"]
                assert lifespan[shop.users].rows == [1]
    assert shop.log == ["give up orders", "close orders", "give up users", "close users"]


async def test_a_lifespan_opened_otherwise_is_the_real_thing_and_has_no_blocks(shop: Shop) -> None:
    async with shop.registry.lifespan() as lifespan:
        with pytest.raises(SandboxError, match=r"with lifekit\.testing\.sandboxing\(\)"):
            async with lifespan.sandbox():
                pytest.fail("it began")
    assert shop.log == ["open users", "open orders", "close orders", "close users"]


async def test_sandboxing_knows_the_lifespans_that_run_in_it(shop: Shop) -> None:
    other = Shop()
    with sandboxing() as opened:
        assert opened.lifespans == []
        async with shop.registry.lifespan() as one, other.registry.lifespan() as two:
            assert opened.lifespans == [one, two]
            with sandboxing() as inner:
                assert inner.lifespans == []
        assert opened.lifespans == []


async def test_blocks_nest_and_the_inner_one_undoes_its_own_and_no_more(shop: Shop) -> None:
    def make(users: Table) -> Table:
        return Table("other", shop.log)

    with sandboxing():
        async with lifespan_with_inner(shop) as lifespan:
            outer = lifespan.block
            lifespan[shop.users].rows.append(1)
            async with lifespan.override(shop.orders, factory=make):
                for _ in range(2):
                    async with lifespan.sandbox() as inner:
                        assert lifespan.block is inner
                        lifespan[shop.users].rows.append(2)
                        lifespan[shop.orders].rows.append(2)
                        taken(shop.log)
                    assert taken(shop.log) == ["end other", "end orders", "end users"]
                    assert lifespan[shop.orders].rows == []
                assert lifespan[shop.users].rows == [1]
            assert taken(shop.log) == ["end other", "give up other", "close other"]
            assert lifespan.block is outer
        assert lifespan.block is None


async def test_two_blocks_at_once_are_refused_also_in_an_outer_one(shop: Shop) -> None:
    """They are those of tests at once, for neither was entered inside the other."""
    inside, over = anyio.Event(), anyio.Event()

    async def other(lifespan: Lifespan) -> None:
        async with lifespan.sandbox():
            inside.set()
            await over.wait()

    with sandboxing():
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            tasks.start_soon(other, lifespan)
            await inside.wait()
            for _ in range(2):
                with pytest.raises(SandboxBusyError, match=r"was not entered by code that was started"):
                    async with lifespan.sandbox():
                        pytest.fail("it began")
            over.set()
        async with lifespan_with_inner(shop) as lifespan, anyio.create_task_group() as tasks:
            inside, over = anyio.Event(), anyio.Event()
            tasks.start_soon(other, lifespan)
            await inside.wait()
            with pytest.raises(SandboxBusyError, match=r"in the sandbox at tests/test_sandbox\.py:\d+"):
                async with lifespan.sandbox():
                    pytest.fail("it began")
            over.set()


@asynccontextmanager
async def lifespan_with_inner(shop: Shop) -> AsyncGenerator[Lifespan]:
    """Run a lifespan, in a block."""
    async with shop.registry.lifespan() as lifespan, lifespan.sandbox():
        yield lifespan


async def test_an_outer_block_that_is_left_first_ends_the_inner_one_and_says_so(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.users].rows.append(1)
            outer, inner = lifespan.sandbox(), lifespan.sandbox()
            await outer.__aenter__()
            lifespan[shop.users].rows.append(2)
            await inner.__aenter__()
            lifespan[shop.users].rows.append(3)
            with pytest.raises(
                SandboxError, match=r"was left while the one at .* inside it was in use"
            ):
                await outer.__aexit__(None, None, None)
            assert lifespan[shop.users].rows == [1]
            await inner.__aexit__(None, None, None)
            async with lifespan.sandbox():
                pass


async def test_a_value_whose_sandbox_does_not_nest_is_refused_by_name(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableSandbox, "nests", False)
    with sandboxing():
        async with shop.registry.lifespan() as lifespan, lifespan.sandbox():
            taken(shop.log)
            with pytest.raises(SandboxUnsupportedError, match="the sandbox of users undoes one block"):
                async with lifespan.sandbox():
                    pytest.fail("it began")
            assert taken(shop.log) == []


@pytest.mark.parametrize("died", [AssertionError("assert"), KeyboardInterrupt(), SystemExit(1)])
async def test_whatever_the_body_dies_of_is_raised_and_all_is_undone(
    shop: Shop, died: BaseException
) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            with pytest.raises(type(died)) as caught:
                async with lifespan.sandbox():
                    lifespan[shop.users].rows.append(1)
                    raise died
            assert caught.value is died
            assert lifespan[shop.users].rows == []


async def test_a_cancelled_body_is_undone_and_stays_cancelled(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            with anyio.CancelScope() as scope:
                async with lifespan.sandbox():
                    lifespan[shop.users].rows.append(1)
                    scope.cancel()
                    await anyio.sleep_forever()
            assert scope.cancelled_caught
            assert lifespan[shop.users].rows == []
            assert shop.log[-2:] == ["end orders", "end users"]


async def test_a_task_cancelled_again_and_again_still_undoes_everything(
    shop: Shop, anyio_backend_name: str
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("trio has no task.cancel()")
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            inside = asyncio.Event()

            async def test() -> None:
                async with lifespan.sandbox():
                    lifespan[shop.users].rows.append(1)
                    inside.set()
                    await anyio.sleep_forever()

            task = asyncio.create_task(test())
            await inside.wait()
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            assert task.cancelled()
            assert lifespan[shop.users].rows == []


async def test_a_begin_that_fails_ends_what_had_begun(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.orders].fails["begin"] = SandboxError("no")
            with pytest.raises(SandboxError, match="no"):
                async with lifespan.sandbox():
                    pytest.fail("it began")
            assert shop.log[2:] == ["begin users", "begin orders", "end orders", "end users"]
            lifespan[shop.orders].fails.clear()
            async with lifespan.sandbox():
                pass


@pytest.mark.parametrize("quick", [("users",), ("orders",), ("users", "orders")])
async def test_what_takes_no_waiting_ends_at_once_before_and_after_what_does(
    shop: Shop, quick: tuple[str, ...]
) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            tables = lifespan[shop.orders], lifespan[shop.users]
            for table in tables:
                table.is_quick = table.name in quick
            async with lifespan.sandbox():
                taken(shop.log)
            ways = [
                f"end at once {each.name}" if each.is_quick else f"end {each.name}" for each in tables
            ]
            assert taken(shop.log) == ways


async def test_an_end_that_fails_fails_the_block_and_the_others_end(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.orders].fails["end"] = SandboxEscapedError("a stray")
            with pytest.raises(SandboxEscapedError, match="a stray"):
                async with lifespan.sandbox():
                    lifespan[shop.users].rows.append(1)
            assert lifespan[shop.users].rows == []
            lifespan[shop.users].fails["end"] = SandboxEscapedError("another")
            with pytest.raises(ExceptionGroup) as caught:
                async with lifespan.sandbox():
                    pass
            assert [str(error) for error in caught.value.exceptions] == ["a stray", "another"]


async def test_where_the_body_failed_too_its_error_has_the_other_as_a_note(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.orders].fails["end"] = SandboxEscapedError("a stray")
            with pytest.raises(ZeroDivisionError) as caught:
                async with lifespan.sandbox():
                    raise ZeroDivisionError
            assert "a stray" in "\n".join(caught.value.__notes__)


async def test_an_end_that_hangs_is_cut_off_and_named(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.orders].hangs = True
            shop.registry.close_timeout = 0.05
            with pytest.raises(SandboxEscapedError, match=r"orders: undoing took longer than 0\.05 s"):
                async with lifespan.sandbox():
                    pass
            assert shop.log[-2:] == ["cut off orders", "end users"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_value_has_the_time_limit_to_itself(backend: str, shop: Shop) -> None:
    """What the one before it took is not taken from it."""

    async def slow(self: TableSandbox) -> None:
        await anyio.sleep(6)
        self.note("end")

    async def main() -> None:
        async with shop.registry.lifespan() as lifespan, lifespan.sandbox():
            pass

    with sandboxing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableSandbox, "end", slow)
        run(main, backend)
    assert [line for line in shop.log if "users" in line or "orders" in line][-6:-4] == [
        "end orders",
        "end users",
    ]


async def test_an_end_that_is_interrupted_is_cut_off_and_the_others_end(shop: Shop) -> None:
    """By what is no Exception, as the time limit of a test-runner."""

    class Interrupted(BaseException):
        pass

    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            lifespan[shop.orders].fails["end"] = Interrupted()  # pyright: ignore
            with pytest.raises(Interrupted):
                async with lifespan.sandbox():
                    pass
            assert shop.log[-3:] == ["end orders", "cut off orders", "end users"]


async def test_blocks_that_overlap_leave_nobody_refused(shop: Shop) -> None:
    """Of two lifespans, the first to begin is the first to end."""
    with sandboxing():
        async with shop.registry.lifespan() as one, Shop().registry.lifespan() as two:
            first, second = one.sandbox(), two.sandbox()
            await first.__aenter__()
            await second.__aenter__()
            await first.__aexit__(None, None, None)
            await second.__aexit__(None, None, None)
            refuse_stragglers("db")


async def test_code_started_in_a_block_is_a_straggler_once_that_has_ended(shop: Shop) -> None:
    go = anyio.Event()
    told: list[Any] = []

    async def late() -> None:
        await go.wait()
        try:
            refuse_stragglers("db")
        except SandboxEscapedError as error:
            told.append(error)

    with sandboxing():
        async with shop.registry.lifespan() as lifespan, anyio.create_task_group() as tasks:
            async with lifespan.sandbox():
                refuse_stragglers("db")
                tasks.start_soon(late)
            refuse_stragglers("db")
            async with lifespan.sandbox():
                refuse_stragglers("db")
                go.set()
                await anyio.wait_all_tasks_blocked()
    (error,) = told
    assert "db is used by code that was started inside the sandbox at tests/test_sandbox.py:" in str(
        error
    )


async def test_what_an_override_rebuilds_is_in_the_block_as_well(shop: Shop) -> None:
    def make(users: Table) -> Table:
        return Table("other", shop.log)

    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            async with lifespan.sandbox():
                taken(shop.log)
                async with lifespan.override(shop.orders, factory=make):
                    assert taken(shop.log) == ["open other", "begin other"]
                assert taken(shop.log) == ["end other", "give up other", "close other"]
            assert taken(shop.log) == ["end orders", "end users"]
            async with lifespan.override(shop.orders, factory=make) as patched:
                taken(shop.log)
                async with patched.sandbox():
                    assert taken(shop.log) == ["begin users", "begin orders", "begin other"]
                assert taken(shop.log) == ["end other", "end orders", "end users"]


async def test_a_value_that_a_generator_made_is_sandboxed_too() -> None:
    registry, log = Registry(), list[str]()

    @registry.resource
    async def users() -> Any:
        yield Table("users", log)
        log.append("close users")

    with sandboxing():
        async with registry.lifespan() as lifespan, lifespan.sandbox():
            pass
    assert log == ["begin users", "end users", "give up users", "close users"]


async def test_the_end_of_the_lifespan_gives_the_sandbox_up_although_that_fails(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "lifekit")
    with sandboxing():
        lifespan = await entered(shop)
        lifespan[shop.orders].fails["give up"] = ZeroDivisionError()
        with pytest.raises(ExceptionGroup):
            await lifespan.__aexit__(None, None, None)
    assert "cut off orders" in shop.log
    assert shop.log[-1] == "close users"


async def entered(shop: Shop) -> Lifespan:
    """Return a lifespan that runs."""
    return await shop.registry.lifespan().__aenter__()


async def test_what_is_built_in_a_block_opens_and_closes_inside_it(shop: Shop) -> None:
    """Also what is built from it: its factory and its closing find the block begun."""

    @shop.registry.resource(shop.orders)
    async def seed(orders: Table) -> AsyncGenerator[None]:
        orders.log.append(f"seed {orders.name}")
        yield
        orders.log.append(f"unseed {orders.name}")

    def make(users: Table) -> Table:
        return Table("other", shop.log)

    with sandboxing():
        async with shop.registry.lifespan() as lifespan, lifespan.sandbox():
            taken(shop.log)
            async with lifespan.override(shop.orders, factory=make):
                assert taken(shop.log) == ["open other", "begin other", "seed other"]
            assert taken(shop.log) == ["unseed other", "end other", "give up other", "close other"]


async def test_an_override_that_outlives_its_block_ends_with_it_and_is_named(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            before = lifespan[shop.orders]
            left = AsyncExitStack()
            with pytest.raises(SandboxEscapedError, match="the override made at tests/test_sandb"):
                async with lifespan.sandbox():
                    override = lifespan.override(shop.orders, Table("other", shop.log))
                    await left.enter_async_context(override)
            assert lifespan[shop.orders] is before
            await left.aclose()


async def test_a_block_is_entered_once(shop: Shop) -> None:
    with sandboxing():
        async with shop.registry.lifespan() as lifespan:
            block = lifespan.sandbox()
            async with block:
                pass
            with pytest.raises(SandboxError, match="was entered before"):
                async with block:
                    pytest.fail("it began again")
            async with lifespan.sandbox():
                pass
