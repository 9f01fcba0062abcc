"""No text that lifekit makes shows a password."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from string import printable
from time import process_time
from urllib.parse import quote, quote_plus

import anyio
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lifekit import DeadlineError, Registry, ShutdownError, StartupError, events
from lifekit._core.stand_in import redact_error
from lifekit._util.redact import redact

from .virtual_time import run

SECRET = "hunter2"
DSN = f"postgresql://app:{SECRET}@db.example.org:5432/shop"

# -- the function ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://app:hunter2@db/shop", "postgresql://app:***@db/shop"),
        ("redis://:hunter2@cache:6379/0", "redis://:***@cache:6379/0"),
        ("rediss://app:hunter2@cache", "rediss://app:***@cache"),
        ("unix://:hunter2@/run/redis.sock?db=1", "unix://:***@/run/redis.sock?db=1"),
        ("POSTGRESQL+asyncpg://app:hunter2@db", "POSTGRESQL+asyncpg://app:***@db"),
        ("https://app:hunter2@api.example.org/v1?x=1", "https://app:***@api.example.org/v1?x=1"),
        ("postgres://app:hunter2@[::1]:5432/shop", "postgres://app:***@[::1]:5432/shop"),
        # several hosts, several URLs
        ("postgresql://app:hunter2@a:1,b:2/shop", "postgresql://app:***@a:1,b:2/shop"),
        ("redis://:hunter2@a/0,redis://:hunter2@b/0", "redis://:***@a/0,redis://:***@b/0"),
        ("from redis://:hunter2@a to redis://:hunter2@b", "from redis://:***@a to redis://:***@b"),
        # users and passwords with characters of their own
        ("postgresql://app%40corp:hunter2@db", "postgresql://app%40corp:***@db"),
        ("postgresql://app@corp:hunter2@db/shop", "postgresql://app@corp:***@db/shop"),
        ("postgresql://app:hunt%40%2F%3Aer2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:hunt@er2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:hunt:er2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:hunt#er2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:hunt?er2@db/shop", "postgresql://app:***@db/shop"),
        ("postgresql://app:hunt/er2@db/shop", "postgresql://app:***@db/shop"),
        # in the query
        (
            "postgresql://db/shop?user=app&password=hunter2",
            "postgresql://db/shop?user=app&password=***",
        ),
        ("postgresql://db?password=hunter2&user=app", "postgresql://db?password=***&user=app"),
        ("postgresql:///shop?sslpassword=hunt%26er2&x=1", "postgresql:///shop?sslpassword=***&x=1"),
        ("https://api/v1?access_token=hunter2&x=1", "https://api/v1?access_token=***&x=1"),
        # libpq's own form
        ("host=db password=hunter2 user=app", "host=db password=*** user=app"),
        ("host=db password = hunter2 user=app", "host=db password = *** user=app"),
        ("host=db password=hunt,er2 user=app", "host=db password=*** user=app"),
        ("host=db password=hunt&er2 user=app", "host=db password=*** user=app"),
        (r"host=db password=hunt\ er2 user=app", "host=db password=*** user=app"),
        ("host=db password='hunt er2' user=app", "host=db password=*** user=app"),
        (r"host=db password='hunt\'er2 x' user=app", "host=db password=*** user=app"),
        ("PGPASSWORD=hunter2 psql", "PGPASSWORD=*** psql"),
        # Python and JSON
        ("connect(host='db', password='hunt er2')", "connect(host='db', password=***)"),
        ("{'host': 'db', 'password': 'hunt er2'}", "{'host': 'db', 'password': ***}"),
        ('{"db_password": "hunt er2", "port": 1}', '{"db_password": ***, "port": 1}'),
        ("Settings(auth_token='hunter2', debug=True)", "Settings(auth_token=***, debug=True)"),
        ("{b'password': b'hunt er2'}", "{b'password': ***}"),
        ("[(b'authorization', b'Bearer hunter2')]", "[(b'authorization', ***)]"),
        (r'"{\"password\": \"hunter2\"}"', r'"{\"password\": ***\"}"'),
        ("credentials={'user': 'app', 'key': 'hunter2'}", "credentials=***"),
        ("['psql', '--password', 'hunter2']", "['psql', '--password', ***]"),
        # keys of other kinds
        ("pwd=hunter2", "pwd=***"),
        ("Driver=x;PWD={hunt;er2};UID=app", "Driver=x;PWD=***;UID=app"),
        ("api_key=hunter2 apikey=hunter2", "api_key=*** apikey=***"),
        ("X-Api-Key: hunter2", "X-Api-Key: ***"),
        ("AWS_SECRET_ACCESS_KEY=hunter2", "AWS_SECRET_ACCESS_KEY=***"),
        ("auth_token: hunter2", "auth_token: ***"),
        ("Authorization: Basic hunter", "Authorization: Basic ***"),
        ("got Bearer hunter2 instead", "got Bearer *** instead"),
        ("https://s3/x?X-Amz-Signature=hunter2&a=b", "https://s3/x?X-Amz-Signature=***&a=b"),
        ("ALTER ROLE app PASSWORD 'hunter2'", "ALTER ROLE app PASSWORD ***"),
        ("-----BEGIN PRIVATE KEY-----\nx\n-----END", "-----BEGIN PRIVATE KEY-----***-----END"),
        # malformed, cut short, or written in another way
        ("redis://:hunter2", "redis://:***"),
        ("redis://app:hunter2 x@cache/0", "redis://app:***@cache/0"),
        ("redis://app:1234/hunter2@cache/0", "redis://app:***@cache/0"),
        ("'redis://app:hunt...' cut", "'redis://app:***' cut"),
        (
            "https://x?next=redis%3A%2F%2Fapp%3Ahunter2%40b",
            "https://x?next=redis%3A%2F%2Fapp%3A***%40b",
        ),
        ("failed to resolve host 'hunter2@db': no", "failed to resolve host '***@db': no"),
        ("netloc 'app:hunter2@db' contains", "netloc 'app:***@db' contains"),
        ("redis://app:hunter2\n@cache/0", "redis://app:***@cache/0"),  # read from a file
        ("got Bearer 1|hunter2€", "got Bearer ***"),
        ("for url 'https://db/x?token=hunter2'", "for url 'https://db/x?token=***'"),
        ("<password>hunter2</password>", "<password>***</password>"),
    ],
)
def test_a_password_is_taken_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "postgresql://db.example.org:5432/shop?sslmode=require",
        "postgresql://app@db.example.org:5432/shop",
        "postgresql://app@a:5432,b:5433/shop",
        "postgres://app@[::1]:5432/shop",
        "redis://cache:6379/0?client_name=a@b",
        "redis://cache:6379?client_name=a@b",
        "http://api:8080/users/me@example.org",
        "mailto:me@example.org",
        "asyncpg pool of 1 to 10, db.example.org:5432/shop",
        'password authentication failed for user "app"',
        "fe_sendauth: no password supplied",
        "WRONGPASS invalid username-password pair or user is disabled.",
        "InvalidPasswordError: try another",
        "unexpected token: ')' at 12:30@7",
        "[Errno 111] Connect call failed ('127.0.0.1', 5432)",
        "PWD=/srv/app OLDPWD=/",
        "token_count=5 max_tokens=5 password_file=/run/x passwordless cache_key=a bypass=1",
        "Bearer token missing, Basic authentication failed",
        "password=None {'password': None}",
        "the option --password is required, argument --token: expected one argument",
        "error: argument --password: expected one argument",
        "password: field required, api_key: Field required, Token: is missing",
        "def login(user: str, password: str, api_key: str | None = None) -> None",
        "ERR AUTH <password> called without any password configured for the default user.",
        "UPDATE x SET password = %(password)s, secret = %s WHERE token = $1::VARCHAR AND pwd = ?",
        "Settings(password=SecretStr('**********'), token='')",
        'WWW-Authenticate: Basic realm="shop", Bearer error="invalid_token"',
        r"PWD=C:\work\shop",
        "connecting to redis://cache:6379... and https://cache:8443, mail ops@example.org",
    ],
)
def test_text_without_a_password_is_untouched(text: str) -> None:
    assert redact(text) == text


passwords = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=["Z", "C"]), min_size=4
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(passwords)
@example("***:@/?#&=%' ")
def test_no_quoted_password_survives(password: str) -> None:
    for encoded in (quote(password, safe=""), quote_plus(password, safe="")):
        around = "could not reach {} (3 attempts)"
        assert redact(around.format(f"postgresql://app:{encoded}@db:5432/shop?x=1")) == (
            "could not reach postgresql://app:***@db:5432/shop?x=1 (3 attempts)"
        )
        assert redact(around.format(f"redis://:{encoded}@a:1,b:2/0")) == (
            "could not reach redis://:***@a:1,b:2/0 (3 attempts)"
        )
        assert redact(around.format(f"postgresql://db/shop?password={encoded}&user=app")) == (
            "could not reach postgresql://db/shop?password=***&user=app (3 attempts)"
        )
    escaped = password.replace("\\", r"\\").replace("'", r"\'")
    assert redact(f"host=db password='{escaped}' user=app") == "host=db password=*** user=app"
    assert redact(f"connect({password=}, user='app')") == "connect(password=***, user='app')"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(printable))
def test_what_is_redacted_stays_as_it_is(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "word",
    [
        *(
            "a",
            "a:",
            "://",
            "a://b:",
            "password",
            "password=",
            "password='\\",
            "@",
            "a://b:@",
            "a://b:...",
        ),
        *(
            "'token':{",
            "host'",
            "--password ",
            "password\n input_value=",
            "input_value=...",
            "<token>",
            "a-",
        ),
        *("Bearer ", "Authorization:", "-----BEGIN PRIVATE KEY-----", "('token',", "%3A%2F%2Fa%3A%40"),
    ],
)
def test_a_long_text_is_no_burden(word: str) -> None:
    text = word * (50_000 // len(word))
    began = process_time()
    redact(text)
    assert process_time() - began < 20  # where the time grows with the square, it is minutes


# -- errors made by others -------------------------------------------------------------------------


def test_an_error_loses_its_passwords_and_keeps_the_rest() -> None:
    error = ConnectionError(f"lost {DSN}", 3, None)
    redact_error(error)
    assert error.args == ("lost postgresql://app:***@db.example.org:5432/shop", 3, None)


def test_an_error_of_the_system_shows_its_own_text_without_the_password() -> None:
    error = ConnectionRefusedError(111, f"can't reach {DSN}", DSN)
    redact_error(error)
    assert error.errno == 111
    assert "app:***@db.example.org" in str(error)
    assert SECRET not in f"{error} {error!r}"


def test_notes_lose_their_passwords() -> None:
    error = ConnectionError("lost it")
    error.add_note(f"connecting to {DSN}")
    redact_error(error)
    assert error.__notes__ == ["connecting to postgresql://app:***@db.example.org:5432/shop"]


def test_causes_contexts_and_groups_lose_their_passwords_even_in_a_ring() -> None:
    errors = [ConnectionError(f"{number}: {DSN}") for number in range(4)]
    first, cause, context, held = errors
    first.__cause__ = cause
    cause.__context__ = context
    context.__cause__ = ExceptionGroup("several", [held, first])
    redact_error(first)
    assert SECRET not in str(errors)


def test_an_error_that_can_not_be_changed_is_left_as_it_is() -> None:
    class StubbornError(Exception):
        @property
        def args(self) -> tuple[str, ...]:  # type: ignore[override]
            raise RuntimeError

    redact_error(StubbornError())


# -- what lifekit makes of errors that hold a DSN --------------------------------------------------


def told(registry: Registry) -> Exception:
    """Run *registry*, and return what comes out."""
    came_out: list[Exception] = []

    async def main() -> None:
        try:
            async with registry.lifespan():
                pass
        except Exception as error:
            came_out.append(error)

    run(main, "asyncio")
    return came_out[0]


def shown(error: Exception, heard: list[events.Event], log: pytest.LogCaptureFixture) -> str:
    """Return every text that lifekit made."""
    texts = [str(error), repr(error), *map(str, heard), *map(repr, heard), *log.messages]
    return "\n".join(texts)


@pytest.mark.parametrize("retry", [0, 1])
def test_a_failed_start_is_told_without_the_password(
    caplog: pytest.LogCaptureFixture, retry: int
) -> None:
    heard: list[events.Event] = []
    registry = Registry(on_event=heard.append)

    @registry.resource(retry=retry)
    async def db() -> None:
        raise ConnectionRefusedError(f"can't reach {DSN}")

    with caplog.at_level(logging.DEBUG, "lifekit"):
        error = told(registry)
    assert isinstance(error, StartupError)
    assert "app:***@db.example.org" in str(error)
    assert any(isinstance(event, events.Retrying) for event in heard) is bool(retry)
    assert SECRET not in shown(error, heard, caplog)


def test_a_failed_stop_is_told_without_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[events.Event] = []
    registry = Registry(on_event=heard.append)

    @registry.resource
    async def db() -> AsyncGenerator[None]:
        yield
        raise ConnectionError(f"lost {DSN}")

    with caplog.at_level(logging.DEBUG, "lifekit"):
        error = told(registry)
    assert isinstance(error, ShutdownError)
    assert "app:***@db.example.org" in str(error)
    assert SECRET not in shown(error, heard, caplog)


def test_a_deadline_shows_the_line_it_stood_at_without_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[events.Event] = []
    registry = Registry(on_event=heard.append)

    @registry.resource(start_timeout=0.01)
    async def db() -> None:
        await connect("postgresql://app:hunter2@db.example.org:5432/shop")

    async def connect(dsn: str) -> None:
        await anyio.sleep_forever()

    with caplog.at_level(logging.DEBUG, "lifekit"):
        error = told(registry)
    assert isinstance(error, StartupError)
    ((_, deadline),) = error.failures
    assert isinstance(deadline, DeadlineError)
    assert "app:***@db.example.org" in str(deadline)
    assert SECRET not in shown(deadline, heard, caplog)
    assert SECRET not in str(deadline.stack)
    assert SECRET not in shown(error, heard, caplog)


def test_a_terminate_that_fails_behind_a_closing_is_told_without_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    over = asyncio.Event()

    class Stubborn:
        async def close(self) -> None:
            while not over.is_set():
                with anyio.CancelScope(shield=True):
                    await over.wait()

        def terminate(self) -> None:
            raise ConnectionError(f"lost {DSN}")

    registry = Registry(close_timeout=0.01)
    registry.resource(name="db")(Stubborn)

    async def main() -> None:
        with pytest.raises(ShutdownError):
            async with registry.lifespan():
                pass
        await anyio.lowlevel.checkpoint()
        over.set()

    with caplog.at_level(logging.DEBUG, "lifekit"):
        run(main, "asyncio")
    assert any("terminate" in message for message in caplog.messages)
    assert SECRET not in "\n".join(caplog.messages)


def test_a_value_that_is_a_dsn_is_in_no_repr() -> None:
    heard: list[events.Event] = []
    registry = Registry(on_event=heard.append)

    @registry.resource
    def dsn() -> str:
        return DSN

    async def main() -> None:
        async with registry.lifespan() as lifespan:
            assert lifespan[dsn] == DSN
            texts = [repr(dsn), repr(registry), repr(lifespan), str(lifespan), str(heard)]
            texts += [str(lifespan.startup), repr(lifespan.startup)]
            assert SECRET not in "\n".join(texts)

    run(main, "asyncio")
