"""Advisory locks of sessions, which outlast a rollback: those of one block are told from others."""

from __future__ import annotations

_OWN = "FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()"
LOCKS = f"SELECT string_agg(format('(%s, %s, %s, %L)', classid, objid, objsubid, mode), ', ') {_OWN}"
"""The query for the locks of the session, as rows of VALUES."""
_UNLOCK = """DO $lifekit$ DECLARE lock record; shared text; released boolean; BEGIN
FOR lock IN SELECT classid::bigint AS class, objid::bigint AS object, objsubid, mode
    {own} AND (classid, objid, objsubid, mode) NOT IN (VALUES {kept})
LOOP
    shared := CASE lock.mode WHEN 'ShareLock' THEN '_shared' ELSE '' END;
    LOOP
        IF lock.objsubid = 1 THEN
            EXECUTE format('SELECT pg_catalog.pg_advisory_unlock%s(%s)', shared,
                (lock.class << 32) | lock.object) INTO released;
        ELSE
            EXECUTE format('SELECT pg_catalog.pg_advisory_unlock%s(%s, %s)', shared,
                lock.class::bit(32)::int, lock.object::bit(32)::int) INTO released;
        END IF;
        EXIT WHEN NOT released;
    END LOOP;
END LOOP; END $lifekit$"""


def unlock_all_but(kept: str) -> str:
    """Return the statement that releases what is not among *kept*, an answer to `LOCKS`."""
    return _UNLOCK.format(own=_OWN, kept=kept)
