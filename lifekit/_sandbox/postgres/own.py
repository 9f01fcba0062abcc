"""What a session says to the server by itself."""

from __future__ import annotations

ANSWERS = {
    "begin": "BEGIN",
    "limit": "SET",
    "block": "SAVEPOINT",
    "set": "SAVEPOINT",
    "release": "RELEASE",
    "undo": "ROLLBACK",
    "rollback": "ROLLBACK",
}
"""The tags of what is answered by nothing else."""
_NO_LIMIT = """CASE current_setting('{0}', true) WHEN '0' THEN '0' ELSE
    CASE WHEN current_setting('{0}', true) IS NOT NULL THEN set_config('{0}', '0', true) END END"""
_LIMITS = (
    "SELECT CASE current_setting('lock_timeout') WHEN '0' "
    "THEN set_config('lock_timeout', '9999', true) END, "
    + ", ".join(
        _NO_LIMIT.format(name)  # of which older servers know not all
        for name in (
            "idle_in_transaction_session_timeout",
            "idle_session_timeout",
            "transaction_timeout",
        )
    )
).encode()
"""The real transaction may be idle and long, and waits for no lock forever."""
ARE_DEFAULT = """SELECT bool_and(setting = '0') FROM pg_catalog.pg_settings
WHERE name IN ('lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout',
    'transaction_timeout')"""
"""Whether all of those are off, so that one of them is all that has to be set."""
_NEWEST = b"SELECT max(oid) FROM pg_catalog.pg_constraint"
_UNLOCK = b"SELECT pg_catalog.pg_advisory_unlock_all(), (%b)" % _NEWEST
"""And tell the newest constraint, by which a change of the schema from elsewhere shows."""
CLOSE_CURSORS = """DO $lifekit$ DECLARE commands text; BEGIN
SELECT string_agg('CLOSE ' || quote_ident(name), ';') INTO commands FROM pg_catalog.pg_cursors
WHERE NOT is_holdable AND name !~ '^lifekit_';
IF commands IS NOT NULL THEN EXECUTE commands; END IF; END $lifekit$"""
IF_PERMITTED = """DO $lifekit$ BEGIN %s;
EXCEPTION WHEN insufficient_privilege THEN NULL; END $lifekit$"""
_DEFERRABLE = """SELECT string_agg(DISTINCT name, ', '),
    string_agg(DISTINCT name, ', ') FILTER (WHERE condeferred)
FROM (SELECT format('%I.%I', nspname, conname) AS name, condeferred
    FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace AS n ON n.oid = connamespace
    WHERE condeferrable AND conparentid = 0) AS each"""
"""The names of all constraints that a commit may have to check, and of those that wait for it."""


def texts(name: bytes) -> dict[str, bytes]:
    """Return what a session prepares for itself, where that is the name of its savepoint."""
    return {
        "rollback": b"ROLLBACK",
        "begin": b"BEGIN",
        "limits": _LIMITS,
        "limit": b"SET LOCAL lock_timeout = 9999",
        "set": b"SAVEPOINT " + name,
        "block": b"SAVEPOINT " + name + b"_block",
        "undo_block": b"ROLLBACK TO SAVEPOINT " + name + b"_block",
        "release_block": b"RELEASE SAVEPOINT " + name + b"_block",
        "release": b"RELEASE SAVEPOINT " + name,
        "undo": b"ROLLBACK TO SAVEPOINT " + name,
        "read_only": b"SET TRANSACTION READ ONLY",
        "fail": b"SELECT 1/0",
        "check": b"SAVEPOINT " + name + b"_check",
        "uncheck": b"ROLLBACK TO SAVEPOINT " + name + b"_check",
        "release_check": b"RELEASE SAVEPOINT " + name + b"_check",
        "deferrable": _DEFERRABLE.encode(),
        "discard": b"DISCARD SEQUENCES",
        "unlock": _UNLOCK,
        "newest": _NEWEST,
    }
