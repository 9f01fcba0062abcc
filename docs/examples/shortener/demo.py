"""The application at work: ``python -m shortener.demo``; with ``--stay``, until Ctrl-C."""

import argparse
import asyncio
import json
import signal
import socket
from contextlib import suppress
from unittest.mock import patch

import httpx2
import uvicorn

from .links import Links, Visits
from .main import app

PAGES = ("https://www.python.org/", "https://www.postgresql.org/")


class Demo(uvicorn.Server):
    """Serves the application on a free port of this machine, and is its first visitor."""

    def __init__(self, *, stay: bool) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_level="warning"))
        self.stay = stay

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, visit, and then either serve on or end."""
        await super().startup(sockets)
        if self.should_exit:  # Ctrl-C came early
            return
        host, port = self.servers[0].sockets[0].getsockname()
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as client:
            await visit(client)
            await watch(client, stay=self.stay)
        if self.stay:
            print(f"Serving http://{host}:{port}/docs until Ctrl-C", flush=True)


async def visit(client: httpx2.AsyncClient) -> None:
    """Make some requests, and print each with its answer."""

    async def ask(method: str, path: str, body: object = None) -> httpx2.Response:
        answer = await client.request(method, path, json=body)
        said = answer.headers.get("location") or answer.text
        print(f"{method:4} {path:14} {answer.status_code} {said}", flush=True)
        return answer

    print()
    slugs: list[str] = []
    for page in PAGES:
        slugs.append((await ask("POST", "/links", {"url": page})).json()["slug"])
    for slug in (*slugs, slugs[0], "unknown"):
        await ask("GET", f"/{slug}")
    await ask("GET", "/health/readyz")


async def watch(client: httpx2.AsyncClient, *, stay: bool) -> None:
    """Print the report until it has all visits; then let SIGTERM end it, unless this is to *stay*."""
    async with client.stream("GET", "/reports/live") as report:
        print(f"GET  /reports/live  {report.status_code}", flush=True)
        lines = report.aiter_lines()
        async for line in lines:
            if line:
                print(f"  {line}", flush=True)
                links = json.loads(line.removeprefix("data: "))
                if sum(link["visits"] for link in links) >= 3:
                    break
        if not stay:
            print("SIGTERM, while that goes on:", end=" ", flush=True)
            signal.raise_signal(signal.SIGTERM)
            async for _ in lines:
                pass
            print("it has ended", flush=True)
    print(flush=True)


async def fail(links: Links, visits: Visits) -> None:
    """Stand in for `Links.save`, once: as if PostgreSQL were not reached."""
    first.stop()
    raise ConnectionError("PostgreSQL is not reached, this once")


first = patch.object(Links, "save", fail)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="shortener.demo")
    parser.add_argument("--stay", action="store_true", help="serve until Ctrl-C")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again at its end
    first.start()
    with suppress(KeyboardInterrupt):
        asyncio.run(Demo(**vars(parser.parse_args())).serve())
