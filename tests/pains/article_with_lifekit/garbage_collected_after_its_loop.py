"""What the application opened is closed in its own event loop, before that is."""

import gc

from fastapi.testclient import TestClient

from .myapp import app

with TestClient(app) as client:
    print(client.get("/api/users").json())
gc.collect()
