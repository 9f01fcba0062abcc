"""The application at work: ``python -m shortener.demo``; with ``--stay``, until Ctrl-C."""

import argparse
import asyncio
import socket
from contextlib import suppress

import httpx2
import uvicorn

from .main import app


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
        await visit(f"http://{host}:{port}")
        if self.stay:
            print(f"Serving http://{host}:{port}/docs until Ctrl-C", flush=True)
        else:
            self.should_exit = True


async def visit(url: str) -> None:
    """Make some requests, and print each with its answer."""
    async with httpx2.AsyncClient(base_url=url) as client:

        async def ask(method: str, path: str, body: object = None) -> httpx2.Response:
            answer = await client.request(method, path, json=body)
            said = answer.headers.get("location") or answer.text
            print(f"{method:4} {path:12} {answer.status_code} {said}")
            return answer

        print()
        slugs: list[str] = []
        for page in ("https://www.python.org/", "https://www.postgresql.org/"):
            slugs.append((await ask("POST", "/links", {"url": page})).json()["slug"])
        for slug in (*slugs, slugs[0], "unknown"):
            await ask("GET", f"/{slug}")
        await ask("GET", "/reports/top")
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="shortener.demo")
    parser.add_argument("--stay", action="store_true", help="serve until Ctrl-C")
    with suppress(KeyboardInterrupt):
        asyncio.run(Demo(**vars(parser.parse_args())).serve())
