"""The command line: ``python -m how_to.jobs_cli`` counts the mails."""

# --8<-- [start:cli]
from .jobs import db, store


def count() -> int:
    with store.blocking() as lifespan:  # the database alone: no queue is needed
        mails: int = lifespan.call(lifespan[db].fetchval, "SELECT count(*) FROM mails")
        return mails


if __name__ == "__main__":
    print(count(), "mails sent")
# --8<-- [end:cli]
