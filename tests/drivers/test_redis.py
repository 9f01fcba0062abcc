"""The redis driver, on real Valkey servers: a plain one, and a cluster of one node."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import Awaitable, Iterator
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from anyio.from_thread import start_blocking_portal
from redis import Redis as SyncRedis
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ConstantBackoff

from lifekit import embedded
from lifekit._core.errors import DeclarationError
from lifekit.drivers.redis import Client, driver

from ..depth import LOOPS
from .conftest import ended, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """redis.asyncio is asyncio's own."""
    return request.param


def connect(url: str, **given: Any) -> Any:
    """A client that is not asyncio's, beside the driver."""
    kind: Any = SyncRedis
    return kind.from_url(url, **given)


def from_url(url: str, kind: Any = Redis, **given: Any) -> Client:
    """`Redis.from_url`, whose type redis-py does not quite say."""
    client: Client = kind.from_url(url, **given)
    return client


class Valkey:
    """A server, and what it knows of one test's connections, by their client name."""

    def __init__(self, url: str, admin: Any) -> None:
        self.url = url
        self.admin = admin
        self.name = uuid4().hex
        address = urlsplit(url)
        self.host, self.port = address.hostname, address.port
        self.password = address.password

    def address(self, **other: Any) -> dict[str, Any]:
        """The arguments that a client is made with."""
        given = {"host": self.host, "port": self.port, "password": self.password}
        return {**given, "client_name": self.name, **other}

    def commands(self) -> list[str]:
        """The last command of each connection."""
        clients = self.admin.client_list()
        return [client["cmd"] for client in clients if client["name"] == self.name]

    async def none_left(self) -> None:
        """Return once the server has none: it notices a little later that one was cut."""
        await until(lambda: not self.commands())


@pytest.fixture
def server(valkey: embedded.Server) -> Iterator[Valkey]:
    """The plain server."""
    with connect(valkey.url, decode_responses=True) as admin:
        yield Valkey(valkey.url, admin)


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    """A cluster of one node that has all the slots."""
    running = embedded.valkey(args=["--cluster-enabled", "yes"])
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running) as server:
        with connect(server.url) as admin:
            admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        yield server.url


@pytest.fixture
def cluster(cluster_url: str) -> Iterator[Valkey]:
    """The cluster's node."""
    with connect(cluster_url, decode_responses=True) as admin:
        yield Valkey(cluster_url, admin)
        admin.execute_command("CLIENT UNPAUSE")


async def in_flight(server: Valkey, command: str, work: Awaitable[object]) -> Awaitable[object]:
    """Run *work*, and return once its command has arrived."""
    task = asyncio.ensure_future(work)
    await until(lambda: command in server.commands())
    return task


async def listen(client: Any) -> None:
    """Wait for a message."""
    pubsub = client.pubsub()
    await pubsub.subscribe("news")
    async for _ in pubsub.listen():
        pass


# -- open, check --------------------------------------------------------------------------------


async def test_open_takes_a_client_and_check_asks_its_server(server: Valkey) -> None:
    """A client connects when it is used first, and the check is that use."""
    client = Redis(**server.address())
    assert await driver.open(client) is client
    assert server.commands() == []
    await driver.check(client)
    assert server.commands() == ["ping"]
    await driver.close(client)


async def test_open_asks_a_cluster_for_its_nodes(cluster: Valkey) -> None:
    """A cluster's client is ready when it is open."""
    client = RedisCluster(**cluster.address())
    assert await driver.open(client) is client
    assert [node.port for node in client.get_nodes()] == [cluster.port]
    await driver.check(client)
    await driver.close(client)
    await cluster.none_left()


async def test_check_raises_where_no_server_answers() -> None:
    """Opening is no proof: nothing was sent yet."""
    client = await driver.open(from_url("redis://127.0.0.1:1"))
    with pytest.raises(exceptions.ConnectionError):
        await driver.check(client)
    await driver.close(client)


@pytest.mark.parametrize("kind", [Redis, RedisCluster])
async def test_a_client_at_work_in_another_loop_survives_its_refusal(
    kind: Any, server: Valkey, cluster: Valkey
) -> None:
    """Two lifespans are handed one client: the second is refused, the first goes on."""
    side = cluster if kind is RedisCluster else server

    async def refuse(client: Client) -> None:
        with pytest.raises(DeclarationError, match=r"another event loop\. Make the client in"):
            await driver.open(client)
        driver.terminate(client)

    def first_lifespan() -> None:
        with asyncio.Runner() as runner:
            client = runner.run(driver.open(kind(**side.address())))
            runner.run(driver.check(client))
            connected = side.commands()
            anyio.from_thread.run(refuse, client)
            runner.run(driver.check(client))
            assert side.commands() == connected
            runner.run(driver.close(client))

    await anyio.to_thread.run_sync(first_lifespan)


async def test_a_client_can_be_opened_again(server: Valkey) -> None:
    """One made at import time serves one lifespan after another, whatever the first cut off."""
    client: Any = await driver.open(Redis(**server.address()))
    waiting = await in_flight(server, "blpop", client.blpop(["queue"]))
    await driver.close(client)
    with pytest.raises(exceptions.ConnectionError):
        await waiting
    await driver.open(client)
    await driver.check(client)
    await driver.close(client)
    await server.none_left()


async def test_a_closed_cluster_client_is_refused(cluster: Valkey) -> None:
    """It does not know its nodes any more, and the message says the mend."""
    client = await driver.open(RedisCluster(**cluster.address()))
    await driver.close(client)
    with pytest.raises(DeclarationError, match=r"closed already\. Make the client in"):
        await driver.open(client)


async def test_a_cluster_that_failed_to_open_leaves_no_connection(server: Valkey) -> None:
    """The plain server is none."""
    client = RedisCluster(**server.address())
    with pytest.raises(exceptions.RedisClusterException, match="not enabled") as caught:
        await driver.open(client)
    driver.terminate(client)
    await server.none_left()
    assert not driver.transient(caught.value)


# -- close, terminate ---------------------------------------------------------------------------


async def test_close_disconnects_the_client(server: Valkey) -> None:
    """Its own pool, as `from_url` makes it."""
    client = await driver.open(from_url(server.url, client_name=server.name))
    await driver.check(client)
    await driver.close(client)
    assert driver.wait_closed(client) is None
    await server.none_left()


class Watched(ConnectionPool):
    """A pool that tells whether it was closed, rather than only cut off."""

    closed = False

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """What its closing does, in every version."""
        await super().disconnect(inuse_connections)
        self.closed = True


async def test_close_closes_a_pool_that_the_client_was_given(server: Valkey) -> None:
    """`aclose()` alone would leave it open."""
    pool = Watched(**server.address())
    client = await driver.open(Redis(connection_pool=pool))
    await driver.check(client)
    await driver.close(client)
    await server.none_left()
    assert pool.closed


ENDS = [pytest.param(driver.close, id="close"), pytest.param(driver.terminate, id="terminate")]


async def end(how: Any, client: Client) -> None:
    """Close or terminate, as the engine does."""
    ending = how(client)
    if ending is not None:
        await ending


@pytest.mark.parametrize("how", ENDS)
async def test_a_command_in_flight_fails_and_does_not_reconnect(how: Any, server: Valkey) -> None:
    """redis-py would send it again over a new connection, up to ten times."""
    retry = Retry(ConstantBackoff(60), 10)
    client: Any = await driver.open(Redis(**server.address(retry=retry)))
    waiting = await in_flight(server, "blpop", client.blpop(["queue"]))
    await end(how, client)
    with pytest.raises(exceptions.ConnectionError), anyio.fail_after(60):
        await waiting
    await server.none_left()


@pytest.mark.parametrize("how", ENDS)
async def test_a_subscription_ends_and_does_not_reconnect(how: Any, server: Valkey) -> None:
    """PubSub reconnects even where commands are not retried."""
    client = await driver.open(from_url(server.url, client_name=server.name))
    listening = await in_flight(server, "subscribe", listen(client))
    await end(how, client)
    with pytest.raises(exceptions.ConnectionError):
        await listening
    await server.none_left()


@pytest.mark.parametrize("how", ENDS)
async def test_a_cluster_command_in_flight_fails_and_does_not_reconnect(
    how: Any, cluster: Valkey
) -> None:
    """redis-py would ask the cluster for its nodes again, and try on one of them."""
    client: Any = await driver.open(RedisCluster(**cluster.address()))
    cluster.admin.execute_command("CLIENT PAUSE", 60_000, "WRITE")
    waiting = await in_flight(cluster, "publish", client.execute_command("PUBLISH", "news", "x"))
    await end(how, client)
    cluster.admin.execute_command("CLIENT UNPAUSE")
    with pytest.raises(exceptions.RedisClusterException):
        await waiting
    await cluster.none_left()


async def test_close_disconnects_a_cluster_client_that_lost_a_node(cluster: Valkey) -> None:
    """`RedisCluster.aclose()` does nothing while the client means to ask for the nodes again."""
    client: Any = await driver.open(RedisCluster(**cluster.address()))
    await driver.check(client)
    client._initialize = True  # what the failure of one node sets, which has to be another's here
    await driver.close(client)
    await cluster.none_left()


async def unused(server: Valkey) -> Client:
    """It never connected."""
    return Redis(**server.address())


async def idle(server: Valkey) -> Client:
    """It did, and nothing is under way."""
    client = await driver.open(Redis(**server.address()))
    await driver.check(client)
    return client


async def single(server: Valkey) -> Client:
    """It holds the one connection that it has."""
    client = await driver.open(Redis(**server.address(single_connection_client=True)))
    await driver.check(client)
    return client


async def closed(server: Valkey) -> Client:
    """Closed as it should be."""
    client = await idle(server)
    await driver.close(client)
    return client


async def terminated(server: Valkey) -> Client:
    """Terminated once already."""
    client = await idle(server)
    driver.terminate(client)
    return client


@pytest.mark.parametrize("state", [unused, idle, single, closed, terminated])
async def test_terminate_cuts_every_connection_in_any_state(state: Any, server: Valkey) -> None:
    """It raises nothing, leaves nothing, and nothing complains when the client is collected."""
    client = await state(server)
    driver.terminate(client)
    await server.none_left()
    del client
    gc.collect()


async def test_terminate_cuts_a_cluster_client_off(cluster: Valkey) -> None:
    """It leaves nothing, and nothing complains when the client is collected."""
    before = asyncio.all_tasks()
    client = await driver.open(RedisCluster(**cluster.address()))
    driver.terminate(client)
    await cluster.none_left()
    await ended(before)
    del client
    gc.collect()


# -- describe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://:hush@cache:6380/3", "redis://:***@cache:6380/3"),
        ("rediss://app:hush@cache", "rediss://app:***@cache:6379/0"),
        ("redis://cache?password=hush&db=2", "redis://:***@cache:6379/2"),
        ("unix:///run/redis.sock?db=1&password=hush", "unix:///run/redis.sock?db=1"),
    ],
)
def test_describe_tells_the_server(url: str, text: str) -> None:
    """However the client was told where to connect, and never a password."""
    assert driver.describe(from_url(url)) == f"redis client, {text}"


def test_describe_tells_the_default_server() -> None:
    """Without any argument."""
    assert driver.describe(Redis()) == "redis client, redis://localhost:6379/0"


def test_describe_tells_the_nodes_of_a_cluster() -> None:
    """Those that it was given, until it knows them all."""
    client = RedisCluster(host="127.0.0.1", port=7000, password="hush")
    assert driver.describe(client) == "redis cluster client, redis://127.0.0.1:7000"


def test_describe_tells_the_service_of_a_sentinel() -> None:
    """Its server is not known before it is asked for."""
    sentinel: Any = Sentinel
    client = sentinel([("127.0.0.1", 26379)]).master_for("shop", password="hush")
    assert driver.describe(client) == "redis client, sentinel service shop"


# -- transient ----------------------------------------------------------------------------------


async def failure(client: Client) -> Exception:
    """What the opening or the check of *client* fails with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await driver.check(await driver.open(client))
    driver.terminate(client)
    return caught.value


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("password", ["wrongsecret", ""])
async def test_a_wrong_password_is_not_transient_and_not_shown(
    protocol: int, password: str, server: Valkey
) -> None:
    """Its error is a ConnectionError to redis-py, with RESP3's HELLO as with AUTH; so is none."""
    url = f"redis://:{password}@{server.host}:{server.port}?protocol={protocol}"
    error = await failure(from_url(url))
    assert isinstance(error, exceptions.AuthenticationError)
    assert not driver.transient(error)
    assert "wrongsecret" not in str(error)


async def test_a_clusters_wrong_password_is_not_transient_and_not_shown(cluster: Valkey) -> None:
    """It is the cause of an error that says that no node could be reached."""
    error = await failure(RedisCluster(**cluster.address(password="wrongsecret")))
    assert isinstance(error, exceptions.RedisClusterException)
    assert not driver.transient(error)
    assert "wrongsecret" not in str(error)


async def test_an_absent_database_is_not_transient(server: Valkey) -> None:
    """A server has as many as it was configured with."""
    assert not driver.transient(await failure(from_url(f"{server.url[:-1]}99")))


async def test_a_forbidden_command_is_not_transient(server: Valkey) -> None:
    """A user who may not even PING."""
    server.admin.acl_setuser(server.name, enabled=True, passwords=["+hush"], commands=["-@all"])
    url = f"redis://{server.name}:hush@{server.host}:{server.port}?protocol=2"
    error = await failure(from_url(url))
    assert isinstance(error, exceptions.NoPermissionError)
    assert not driver.transient(error)
    server.admin.acl_deluser(server.name)


@pytest.mark.parametrize("kind", [Redis, RedisCluster])
async def test_a_refused_port_is_transient(kind: Any) -> None:
    """The server is not up yet."""
    assert driver.transient(await failure(from_url("redis://127.0.0.1:1", kind)))


async def test_a_server_that_does_not_answer_is_transient() -> None:
    """It accepts, and then says nothing."""
    quiet: list[asyncio.StreamWriter] = []
    listening = await asyncio.start_server(lambda _, writer: quiet.append(writer), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    error = await failure(from_url(f"redis://127.0.0.1:{port}?socket_timeout=0.05"))
    assert isinstance(error, exceptions.TimeoutError)
    assert driver.transient(error)
    listening.close()
    for writer in quiet:
        writer.close()
        await writer.wait_closed()
    await listening.wait_closed()


async def test_a_cluster_that_is_forming_is_transient(cluster: Valkey) -> None:
    """Not every slot has a node yet."""
    cluster.admin.execute_command("CLUSTER DELSLOTSRANGE", 0, 16383)
    error = await failure(RedisCluster(**cluster.address()))
    cluster.admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    assert isinstance(error, exceptions.RedisClusterException)
    assert driver.transient(error)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (exceptions.BusyLoadingError("loading the dataset in memory"), True),
        (exceptions.ClusterDownError("the cluster is down"), True),
        (exceptions.MaxConnectionsError("too many connections"), False),
        (exceptions.ResponseError("unknown command"), False),
        (LookupError("a bug"), False),
    ],
)
def test_only_a_server_that_is_not_ready_is_transient(error: Exception, passes: bool) -> None:
    """What a real server can't be made to say on demand."""
    assert driver.transient(error) is passes


def test_a_bad_certificate_is_not_transient() -> None:
    """It is a ConnectionError as well, and stays bad."""
    error = exceptions.ConnectionError("certificate verify failed")
    error.__context__ = ssl.SSLCertVerificationError()
    assert not driver.transient(error)
