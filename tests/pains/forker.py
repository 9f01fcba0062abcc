"""Runs programs, each in a process of its own, forked from one that has imported what they use.

A program runs as ``python -W default -m its.module`` would run it, and ends as an interpreter ends:
what it says while it is torn down is part of what it shows. Only the imports are paid for once.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import signal
import sys
import types
from asyncio.base_events import BaseEventLoop
from time import monotonic
from typing import Any

AT_ONCE = 3
SECONDS = 300
"""After which a program is killed that hangs: none takes a tenth of it."""

IMPORTED = (
    "aiopg asyncpg fastapi.testclient fastapi httpx httpx2 psycopg_pool pytest pytest_asyncio "
    "redis.asyncio sqlalchemy.ext.asyncio uvicorn fakeredis lifekit.pytest_plugin "
    "lifekit.testing._pytest lifekit._core.engine lifekit.drivers.aiopg lifekit.drivers.asyncpg "
    "lifekit.drivers.psycopg lifekit.drivers.redis lifekit.drivers.sqlalchemy "
    "lifekit._sandbox.postgres.sandbox lifekit._sandbox.redis.client"
)


def asked() -> dict[str, Any]:
    """Return, in a new process, what one line of the standard input asks for; in the first, exit."""
    under_way = 0
    for line in sys.stdin:
        while under_way and (under_way >= AT_ONCE or os.waitpid(-1, os.WNOHANG)[0]):
            if under_way >= AT_ONCE:
                os.waitpid(-1, 0)
            under_way -= 1
        under_way += 1
        if os.fork() == 0:
            request: dict[str, Any] = json.loads(line)
            if (program := os.fork()) == 0:
                return request
            _, status = os.waitpid(program, 0)
            answer = {"number": request["number"], "status": os.waitstatus_to_exitcode(status)}
            os.write(1, f"{json.dumps(answer)}\n".encode())
            os._exit(0)
    os._exit(0)


def run(request: dict[str, Any]) -> None:
    """Be the program."""
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(request["environment"])
    if request["hurry"]:
        hurry(request["hurry"])
    if request["pytest"] is None:
        be(request["module"])
    else:
        import pytest

        sys.exit(pytest.main(request["pytest"]))


def be(name: str) -> None:
    """Run a module as the program that `python -m` makes of it."""
    finder: Any = runpy
    _, spec, code = finder._get_module_details(name)
    program: Any = types.ModuleType("__main__")
    program.__dict__.update(
        __spec__=spec, __file__=code.co_filename, __package__=name.rpartition(".")[0]
    )
    sys.modules["__main__"] = program
    sys.argv[:] = [code.co_filename]
    exec(code, program.__dict__)


def hurry(times: float) -> None:
    """Let the clock of this program's event loops run so many times faster."""

    class Hurried(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            return super().select(timeout and timeout / times)

    selectors.DefaultSelector = Hurried  # type: ignore[misc]
    BaseEventLoop.time = lambda self: monotonic() * times  # type: ignore[method-assign]


if __name__ == "__main__":
    for each in IMPORTED.split():
        __import__(each)
    gc.freeze()  # else each process would go through all of that when it ends
    run(asked())
