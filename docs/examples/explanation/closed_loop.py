"""One connection, two event loops, three errors: no framework, no driver, no test library."""

import asyncio
import socketserver
import threading


class Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


def main() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            use_in_two_loops(server.server_address[1])
        finally:
            server.shutdown()


# --8<-- [start:story]
async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"hello\n")
    return await reader.readline()


def use_in_two_loops(port: int) -> None:
    first = asyncio.new_event_loop()
    reader, writer = first.run_until_complete(asyncio.open_connection("127.0.0.1", port))
    print("first loop: ", first.run_until_complete(ask(reader, writer)))

    try:
        asyncio.run(ask(reader, writer))
    except RuntimeError as error:
        print("second loop:", error)

    first.close()
    try:
        writer.close()
    except RuntimeError as error:
        print("at the end: ", error)
    # --8<-- [end:story]
    writer.transport.get_extra_info("socket")._sock.close()  # what the end of the process does


if __name__ == "__main__":
    main()
