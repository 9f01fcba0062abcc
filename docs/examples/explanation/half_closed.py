"""`close()` only begins to close: what the other side gets depends on who waits."""

import asyncio
import gc
import queue
import socketserver
import threading

SIZE = 50_000_000
counts: queue.Queue[int] = queue.Queue()


class Count(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        count = 0
        try:
            while chunk := self.request.recv(1_000_000):
                count += len(chunk)
        finally:
            counts.put(count)


# --8<-- [start:story]
async def send(port: int, *, wait: bool) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(bytes(SIZE))
    writer.close()  # begins
    if wait:
        await writer.wait_closed()  # has ended


# --8<-- [end:story]


def main() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Count) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for wait in (False, True):
            asyncio.run(send(server.server_address[1], wait=wait))
            gc.collect()  # until then the socket stays open, and the server hears nothing
            arrived = "all" if counts.get(timeout=60) == SIZE else "a part"
            print(f"wait_closed() {'awaited' if wait else 'left out'}: {arrived}")
        server.shutdown()


if __name__ == "__main__":
    main()
