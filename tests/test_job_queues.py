"""Workers of Celery, arq and taskiq, as processes: their jobs use a lifespan of their process's own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest
from anyio import to_thread

from lifekit.embedded import Server

from .pages import ROOT

EXAMPLES = ROOT / "docs" / "examples"
LIMIT = 120
"""Seconds for what takes one, for a machine that is busy."""
pytestmark = [pytest.mark.anyio, pytest.mark.long]  # processes of their own, which import much


@pytest.fixture
def anyio_backend() -> str:
    """The drivers are asyncio's own."""
    return "asyncio"


@pytest.fixture(autouse=True)
async def _servers(  # pyright: ignore[reportUnusedFunction]
    postgres: Server, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres.url)
    monkeypatch.setenv("REDIS_URL", valkey.url)


@contextmanager
def _worker(*command: str) -> Generator[None]:
    """Run a worker; at the end it has ended in order, with no connection left."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=EXAMPLES,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield
        process.terminate()
        printed = process.communicate(timeout=LIMIT)[0]
        assert process.returncode == 0, printed
        assert "Traceback" not in printed, printed
    finally:
        process.kill()
        process.communicate()


async def _sent(postgres: Server, recipient: str) -> int:
    connection = await asyncpg.connect(postgres.url)
    try:
        found: int = await connection.fetchval(
            "SELECT count(*) FROM mails WHERE recipient = $1", recipient
        )
    finally:
        await connection.close()
    return found


def _example(name: str, *packages: str) -> Any:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    sys.modules.pop(f"how_to.{name}", None)  # it reads the environment when it is imported
    return importlib.import_module(f"how_to.{name}")


async def test_a_task_of_celery_uses_the_lifespan_of_its_process(postgres: Server) -> None:
    mails_celery = _example("mails_celery", "celery")
    with _worker("celery", "-A", "how_to.mails_celery:mails", "worker", "--concurrency=1"):
        result = mails_celery.send.delay("celery@example.org")
        process = await to_thread.run_sync(lambda: result.get(timeout=LIMIT))
    mails_celery.mails.close()
    assert process != os.getpid()
    assert await _sent(postgres, "celery@example.org") == 1


async def test_a_job_of_arq_uses_the_lifespan_of_its_worker(postgres: Server) -> None:
    mails_arq = _example("mails_arq", "arq")
    from arq import create_pool  # pyright: ignore[reportUnknownVariableType]

    pool: Any = await create_pool(mails_arq.WorkerSettings.redis_settings)
    with _worker("arq", "how_to.mails_arq.WorkerSettings"):
        job = await pool.enqueue_job("send", "arq@example.org")
        process = await job.result(timeout=LIMIT)
    await pool.aclose()
    assert process != os.getpid()
    assert await _sent(postgres, "arq@example.org") == 1


async def test_a_task_of_taskiq_uses_the_lifespan_of_its_worker(postgres: Server) -> None:
    mails_taskiq = _example("mails_taskiq", "taskiq", "taskiq_redis")
    await mails_taskiq.broker.startup()
    with _worker("taskiq", "worker", "how_to.mails_taskiq:broker", "--workers", "1"):
        task = await mails_taskiq.send.kiq("taskiq@example.org")
        result = await task.wait_result(timeout=LIMIT)
    await mails_taskiq.broker.shutdown()
    assert result.return_value != os.getpid()
    assert await _sent(postgres, "taskiq@example.org") == 1
