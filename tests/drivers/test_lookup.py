"""How a value's driver is found."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import asyncpg
import httpx
import httpx2
import pytest
from redis.asyncio import Redis

from lifekit import drivers
from lifekit.drivers import Driver
from lifekit.drivers.asyncpg import driver as asyncpg_driver
from lifekit.drivers.httpx import driver as httpx_driver
from lifekit.drivers.redis import driver as redis_driver
from lifekit.embedded import Server

pytestmark = pytest.mark.anyio


class Mailer:
    """A user's own resource."""


class SmtpMailer(Mailer):
    """A kind of it."""


class MyRedis(Redis):
    """A user's kind of a known one."""


@pytest.fixture
def anyio_backend() -> str:
    """The one test that needs a loop needs asyncpg."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifekit._core.drivers._registered", {})


def imported_by(code: str) -> set[str]:
    """Which packages that lifekit has drivers for *code* imports."""
    packages = {"asyncpg", "aiopg", "psycopg2", "redis", "httpx", "httpx2"}
    script = f"{code}\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return packages & set(result.stdout.split())


def test_importing_lifekit_imports_no_driver_package() -> None:
    """Nor does looking up what has no driver, nor asking for the drivers in use."""
    code = "from lifekit import drivers; assert not drivers.find(1); assert not [*drivers.loaded()]"
    assert imported_by(code) == set()


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_httpx_and_httpx2_do_not_import_each_other(package: str) -> None:
    """Their driver serves either where the other is not installed."""
    code = f"import {package}; from lifekit import drivers; client = {package}.AsyncClient(); "
    code += "driver = drivers.find(client); assert driver.describe(client); "
    code += "assert [*drivers.loaded()] == [driver]"
    assert imported_by(code) == {package}


def test_a_known_value_has_its_driver() -> None:
    """Built-in drivers are found by the names of types; the two httpx share one."""
    assert drivers.find(Redis()) is redis_driver
    assert drivers.find(httpx.AsyncClient()) is httpx_driver
    assert drivers.find(httpx2.AsyncClient()) is httpx_driver


def test_a_users_subclass_has_its_bases_driver() -> None:
    """The method resolution order decides."""
    assert drivers.find(MyRedis()) is redis_driver


def test_an_unknown_value_has_no_driver() -> None:
    """It is closed by the protocols that it has."""
    assert drivers.find(Mailer()) is None


def test_a_users_own_type_has_the_driver_that_is_registered() -> None:
    """And so have its subclasses."""
    mine = Driver[Mailer]()
    drivers.register(Mailer, mine)
    assert drivers.find(Mailer()) is mine
    assert drivers.find(SmtpMailer()) is mine


def test_the_nearest_base_decides() -> None:
    """A driver for a subclass leaves the base's values to the base's."""
    base, kind = Driver[Mailer](), Driver[SmtpMailer]()
    drivers.register(Mailer, base)
    drivers.register(SmtpMailer, kind)
    assert drivers.find(Mailer()) is base
    assert drivers.find(SmtpMailer()) is kind


def test_a_subclass_of_a_known_type_may_have_a_driver_of_its_own() -> None:
    """The known type keeps the built-in one."""
    mine = Driver[MyRedis]()
    drivers.register(MyRedis, mine)
    assert drivers.find(MyRedis()) is mine
    assert drivers.find(Redis()) is redis_driver


def test_a_registered_driver_wins_over_the_built_in_one() -> None:
    """For the very same type."""
    mine = Driver[Redis]()
    drivers.register(Redis, mine)
    assert drivers.find(Redis()) is mine
    assert drivers.find(MyRedis()) is mine


async def test_an_open_pool_is_found_as_before(postgres: Server) -> None:
    """Its class was exchanged when it opened; what is registered still wins."""
    pool: Any = await asyncpg_driver.open(asyncpg.create_pool(postgres.url, min_size=0))
    assert drivers.find(pool) is asyncpg_driver
    mine = Driver[Any]()
    drivers.register(asyncpg.Pool, mine)
    assert drivers.find(pool) is mine
    await pool.close()


def test_loaded_names_each_driver_in_use_once() -> None:
    """The registered ones, and those of the packages that are imported."""
    mine = Driver[Mailer]()
    drivers.register(Mailer, mine)
    drivers.register(SmtpMailer, mine)
    loaded = list(drivers.loaded())
    assert loaded.count(mine) == 1
    assert {asyncpg_driver, redis_driver, httpx_driver} <= set(loaded)


async def test_a_driver_that_overrides_nothing_does_nothing() -> None:
    """A user's driver says only what differs."""
    driver, mailer = Driver[Mailer](), Mailer()
    assert await driver.open(mailer) is mailer
    await driver.check(mailer)
    assert driver.close(mailer) is None
    assert driver.wait_closed(mailer) is None
    assert driver.terminate(mailer) is None
    assert driver.describe(mailer) == "Mailer"
    assert driver.holders(mailer) == ()
    assert not driver.transient(ConnectionError())
    driver.salvage(ConnectionError())
