"""Packages whose values reach what outlives a test: a database, a cache, a queue, a store of files.

A value of theirs that no driver's sandbox undoes is refused when a block begins, because what it does
would be permanent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from lifekit._core.drivers import Driver, Sandbox
from lifekit._core.errors import SandboxUnsupportedError
from lifekit._core.resource import Resource

_STORES: Mapping[str, str] = {
    "a database": """
        acsylla aerospike aiochclient aiomysql aioodbc aiopg aiosqlite asynch asyncmy asyncpg
        azure.cosmos beanie boto3.dynamodb cassandra chromadb clickhouse_connect clickhouse_driver
        couchbase cx_Oracle databases duckdb edgedb elastic_transport elasticsearch gel gino
        google.cloud.bigquery google.cloud.bigtable google.cloud.datastore google.cloud.firestore
        influxdb influxdb_client lancedb mariadb mongoengine motor mysql MySQLdb neo4j odmantic
        opensearchpy oracledb ormar peewee peewee_async pg8000 piccolo pinecone pony prisma psycopg
        psycopg2 psycopg_pool pymilvus pymongo pymssql pymysql pyodbc qdrant_client rethinkdb scyllapy
        sqlite3 surrealdb tortoise weaviate
    """,
    "a cache": """
        aiocache aiomcache aioredis coredis emcache glide memcache pylibmc pymemcache redis redis_om
        valkey
    """,
    "a queue": """
        aio_pika aiokafka aiomqtt aiormq amqp arq azure.eventhub azure.servicebus celery confluent_kafka
        dramatiq faststream google.cloud.pubsub google.pubsub huey kafka kombu nats paho pika
        procrastinate pulsar rq saq stomp streaq taskiq
    """,
    "a service that keeps what it is sent": """
        aioboto3 aiobotocore aioetcd3 azure.storage boto3 botocore consul etcd3
        google.cloud.storage kazoo minio
    """,
}
_FAKES = """
        aiocache.backends.memory dramatiq.brokers.stub fakeredis lifekit mongomock mongomock_motor
        taskiq.brokers.inmemory_broker
    """
_BY_DOORS = (
    *("pg8000", "piccolo.engine.postgres"),
    *("tortoise.backends.asyncpg", "tortoise.backends.psycopg"),
)
"""What connects by a client of PostgreSQL that has a door, and by nothing else."""
_KNOWN = {
    **{package: what for what, packages in _STORES.items() for package in packages.split()},
    **dict.fromkeys([*_FAKES.split(), *_BY_DOORS], ""),
}


def package_of(value: object) -> tuple[str, str]:
    """Return the package by which *value* reaches something, and what; '' where it is none of these."""
    for kind in type(value).__mro__:
        parts = kind.__module__.split(".")
        for end in range(len(parts), 0, -1):
            package = ".".join(parts[:end])
            if package in _KNOWN:
                what = "" if _is_by_doors(package, value) else _KNOWN[package]
                return (package, what) if what else ("", "")
    return "", ""


def _is_by_doors(package: str, value: Any) -> bool:
    # `databases` has a client by the scheme of its URL.
    scheme = str(getattr(value, "url", "")).partition(":")[0].partition("+")[0]
    return package == "databases" and scheme in ("postgresql", "postgres")


def refusal(
    resource: Resource[Any], value: object, needs: Iterable[object], driver: Driver[Any] | None
) -> Sandbox | None:
    """Return what refuses blocks for *value*; None where it reaches nothing, or can be undone.

    What is built from another resource's value of the same package, as a collection from its client,
    reaches no more than that does.
    """
    if driver is not None and _undoes(driver):
        return None
    package, what = package_of(value)
    if not package or any(package_of(need)[0] == package for need in needs):
        return None
    return _Refusal(resource, type(value), what)


def _undoes(driver: Driver[Any]) -> bool:
    kind, base = type(driver), cast("type[Any]", Driver)
    return kind.sandbox is not base.sandbox or kind.redirect is not base.redirect


class _Refusal(Sandbox):
    """The sandbox of a value that can have none."""

    def __init__(self, resource: Resource[Any], kind: type, what: str) -> None:
        self._resource, self._kind, self._what = resource, kind, what

    async def begin(self) -> None:
        """Say so.

        Raises:
            SandboxUnsupportedError: Always.
        """
        name, kind = self._resource.name, f"{self._kind.__module__}.{self._kind.__qualname__}"
        raise SandboxUnsupportedError(
            f"{name} ({self._resource.location}) is a {kind}, which "
            f"reaches {self._what}, and the sandbox can't undo what it does. Override it in tests, "
            f"`registry.override({name}, …)`, where `lifekit.testing.mock({name})` makes a mock of it; "
            'run the test without a sandbox, @pytest.mark.lifekit(isolation="none"); or say in its '
            "declaration that what it does may last: @registry.resource(…, sandbox=False)."
        )
