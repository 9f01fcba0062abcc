"""What libpq's clients are given so that they connect by way of a gateway.

libpq takes what is not said from the environment, from a password file, and from what it was built
with. What depends on the server's name has to be looked up here: the client is to know another name.
See https://www.postgresql.org/docs/current/libpq-connect.html.
"""

from __future__ import annotations

import functools
import getpass
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from lifekit._core.drivers import Gateway, Tls
from lifekit._core.errors import SandboxUnsupportedError

_VARIABLES = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "user": "PGUSER",
    "dbname": "PGDATABASE",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
}
_OF_THE_WAY = {"hostaddr", "passfile", "service", "sslrootcert", "sslcert", "sslkey", "requiressl"}
_SOCKETS = ("/var/run/postgresql", "/tmp")
"""Where the common builds of libpq look for the server's own."""


def redirected(given: Mapping[str, Any], gateway: Gateway) -> dict[str, Any]:
    """Return the parameters that lead by way of the gateway to where those *given* lead.

    Raises:
        SandboxUnsupportedError: They name a service, or several servers.
    """
    host, port, tls, password = _way(_known(given))
    folder, number = gateway.socket(host, port, tls=tls)
    pointed = {name: value for name, value in given.items() if name not in _OF_THE_WAY}
    pointed |= {"host": folder, "port": number, "sslmode": "disable", "gssencmode": "disable"}
    pointed |= {"channel_binding": "disable"}  # which needs TLS from end to end
    if password:
        pointed["password"] = password
    return pointed


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given, and what libpq takes from the environment."""
    named = {
        name: os.environ[variable] for name, variable in _VARIABLES.items() if variable in os.environ
    }
    return {**named, **{name: value for name, value in given.items() if value is not None}}


def _way(known: Mapping[str, Any]) -> tuple[str, int, Tls | None, str | None]:
    """Return the server's host and port, how to encrypt, and the password for it."""
    if known.get("service"):
        raise SandboxUnsupportedError(
            f"the service {known['service']!r} of a service file: the sandbox does not read it. Name "
            "host, port, user and database in the test's settings."
        )
    port = int(known.get("port") or 5432)
    host = str(known.get("hostaddr") or known.get("host") or "") or _own_socket(port)
    return host, port, _tls(known, host), known.get("password") or _from_file(known, port)


def redirected_url(url: str, gateway: Any) -> str:
    """Return the URL that leads by way of the gateway to where *url* leads.

    Raises:
        SandboxUnsupportedError: It names a service, or several servers.
    """
    parts = urlsplit(url)
    login, _, address = parts.netloc.rpartition("@")
    user, _, secret = login.partition(":")
    if "," in address:  # of which urlsplit() makes nothing good
        gateway.port(address, 0)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    given: dict[str, Any] = {
        "host": unquote(parts.hostname or ""),
        "port": parts.port,
        "user": unquote(user),
        "password": unquote(secret),
        "dbname": unquote(parts.path[1:]),
    }
    given = {name: value for name, value in given.items() if value}
    if "ssl" in query:  # as SQLAlchemy and asyncpg's own tools call it
        query["sslmode"] = {"true": "require", "false": "disable"}.get(query["ssl"], query["ssl"])
    known = _known({**given, **query})
    host, port, tls, password = _way(known)
    number = gateway.port(host, port, tls=tls)
    user = str(known.get("user") or getpass.getuser())
    named = f"{quote(user, safe='')}{':' if password else ''}{quote(password or '', safe='')}"
    dropped = {*_OF_THE_WAY, "host", "port", "user", "password", "sslmode", "ssl"}
    kept = {name: value for name, value in query.items() if name not in dropped}
    kept.pop("channel_binding", None)
    there = parts._replace(netloc=f"{named}@127.0.0.1:{number}", query=urlencode(kept))
    return there.geturl()


def _own_socket(port: int) -> str:
    found = (each for each in _SOCKETS if os.path.exists(f"{each}/.s.PGSQL.{port}"))
    return next(found, "localhost")


def _tls(known: Mapping[str, Any], host: str) -> Tls | None:
    mode = known.get("sslmode") or "prefer"
    if host.startswith("/") or mode in ("disable", "allow"):
        return None
    authorities = known.get("sslrootcert") or _home("root.crt")
    certificate, key = known.get("sslcert") or _home("postgresql.crt"), known.get("sslkey")
    context = _context(mode, authorities, certificate, key)
    return Tls(context, is_required=mode != "prefer", name=known.get("host"))


@functools.cache  # one for all who connect alike: a server with another one would be another server
def _context(
    mode: str, authorities: str | None, certificate: str | None, key: str | None
) -> ssl.SSLContext:
    checks = mode in ("verify-ca", "verify-full") or bool(authorities and mode == "require")
    context = ssl.create_default_context(
        cafile=authorities if checks and authorities not in (None, "system") else None
    )
    context.check_hostname = mode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if checks else ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(certificate, key or _home("postgresql.key"))
    return context


def _home(name: str) -> str | None:
    path = Path("~/.postgresql", name).expanduser()
    return str(path) if path.exists() else None


def _from_file(known: Mapping[str, Any], port: int) -> str | None:
    path = Path(known.get("passfile") or "~/.pgpass").expanduser()
    if not path.is_file():
        return None
    user = str(known.get("user") or getpass.getuser())
    host = str(known.get("host") or "localhost")
    wanted = (host, str(port), str(known.get("dbname") or known.get("database") or user), user)
    for line in path.read_text().splitlines():
        # Colons and backslashes in a field stand behind a backslash.
        fields = [
            re.sub(r"\\(.)", r"\1", each) for each in re.findall(r"((?:\\.|[^:\\])*)(?::|$)", line)
        ]
        fits = (field in ("*", value) for field, value in zip(fields, wanted, strict=False))
        if line[:1] != "#" and len(fields) > 4 and all(fits):
            return fields[4]
    return None
