"""A client of one's own, for a store of pages that is reached over TCP, and a server to try it on."""

# --8<-- [start:client]
import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Pages:
    """Keeps pages by name, in a space: other clients of the server may use another one."""

    def __init__(self, host: str, port: int, space: str = "main") -> None:
        self.host, self.port, self.space = host, port, space
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self) -> None:
        self._streams = await asyncio.open_connection(self.host, self.port)

    async def put(self, name: str, text: str) -> None:
        await self._ask(f"PUT {self.space}/{name} {text}")

    async def get(self, name: str) -> str:
        return await self._ask(f"GET {self.space}/{name}")

    async def clear(self, space: str) -> None:
        await self._ask(f"CLEAR {space}/")

    async def ping(self) -> None:
        await self._ask("PING")

    async def _ask(self, line: str) -> str:
        if self._streams is None or self._streams[1].is_closing():
            raise ConnectionError("this client is not connected")
        reader, writer = self._streams
        async with self._turn:
            writer.write(f"{line}\n".encode())
            return (await reader.readline()).decode().strip()

    # --8<-- [end:client]
    # --8<-- [start:closing]
    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()

    async def wait_closed(self) -> None:
        if self._streams is not None:
            await self._streams[1].wait_closed()

    def abort(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()


# --8<-- [end:closing]


@asynccontextmanager
async def serving() -> AsyncGenerator[tuple[dict[str, str], int]]:
    """Run a server; gives its pages, for a look, and its port."""
    pages: dict[str, str] = {}
    serving = set[asyncio.Task[None] | None]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        while line := (await reader.readline()).decode().strip():
            verb, _, rest = line.partition(" ")
            name, _, text = rest.partition(" ")
            answer = "ok"
            if verb == "PUT":
                pages[name] = text
            elif verb == "GET":
                answer = pages.get(name, "")
            elif verb == "CLEAR":
                for each in [each for each in pages if each.startswith(name)]:
                    del pages[each]
            writer.write(f"{answer}\n".encode())
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield pages, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*(task for task in serving if task is not None))
