"""An application that keeps its notes in memory, and tells what it lives through."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path

from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lifekit import Driver, Registry, SandboxEscapedError
from lifekit.drivers import Sandbox, register

registry = Registry("memory")
kept: list[str] = []
"""What outlives every lifespan, like a database."""


def tell(line: str) -> None:
    """Append a line to the file that TOLD names."""
    with Path(os.environ["TOLD"]).open("a") as file:
        file.write(f"{line}\n")


class Notes:
    """A value with a sandbox."""

    def __init__(self) -> None:
        self.lines = kept


class NotesSandbox(Sandbox):
    """Forgets what was noted since it began; fails if that is a stray."""

    def __init__(self) -> None:
        self.before: list[list[str]] = []

    async def begin(self) -> None:
        await checkpoint()
        self.before.append(kept.copy())

    async def end(self) -> None:
        await checkpoint()
        stray = "stray" in kept
        kept[:] = self.before.pop()
        if stray:
            raise SandboxEscapedError("a stray was noted")


class NotesDriver(Driver[Notes]):
    """Knows them."""

    def sandbox(self, value: Notes) -> Sandbox:
        return NotesSandbox()


register(Notes, NotesDriver())


@registry.resource
async def notes() -> AsyncGenerator[Notes]:
    failure = os.environ.get("FAIL_AT", "")
    tell("open")
    if failure == "start":
        raise ConnectionError("no notes to be had")
    yield Notes()
    tell(f"close {len(kept)}")
    if failure == "stop":
        raise ConnectionError("the notes would not go")


async def note(request: Request) -> JSONResponse:
    """Note a line, and return all of them."""
    lines = notes.get().lines
    lines.append(request.path_params["line"])
    return JSONResponse(lines)


app = Starlette(lifespan=registry.lifespan, routes=[Route("/{line}", note)])
