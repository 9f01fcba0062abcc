"""The worker for gunicorn that the documentation shows, with less patience."""

from __future__ import annotations

from how_to.gunicorn_worker import Worker


class ImpatientWorker(Worker):
    """It cuts requests off after a second."""

    CONFIG_KWARGS = Worker.CONFIG_KWARGS | {"timeout_graceful_shutdown": 1}
