"""A client of PostgreSQL that is a program of its own, and the driver by which tests undo it."""

# --8<-- [start:client]
import asyncio
from subprocess import PIPE


class Exporter:
    """Writes tables as CSV, with psql."""

    def __init__(self, url: str, psql: str = "psql") -> None:
        self.url, self.psql = url, psql

    async def csv(self, table: str) -> str:
        command = [self.psql, self.url, "-qc", f"COPY {table} TO STDOUT CSV"]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        written, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"psql ended with {process.returncode}")
        return written.decode()


# --8<-- [end:client]
# --8<-- [start:driver]
from lifekit.drivers import Driver, Gateway, register  # noqa: E402


class ExporterDriver(Driver[Exporter]):
    def redirect(self, value: Exporter, gateway: Gateway) -> None:
        value.url = gateway.url(value.url)


register(Exporter, ExporterDriver())
# --8<-- [end:driver]
