# pyright: reportMissingTypeStubs=false
"""A worker for gunicorn that cuts requests off while there is still time to close."""

# --8<-- [start:worker]
from uvicorn_worker import UvicornWorker


class Worker(UvicornWorker):
    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {"timeout_graceful_shutdown": 10}


# --8<-- [end:worker]
