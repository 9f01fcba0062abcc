"""wireup with FastAPI's own route class, as its quick start has it."""

from functools import partial

from fastapi.routing import APIRoute

from . import on_wireup

one = partial(on_wireup.one, route_class=APIRoute)
chain = partial(on_wireup.chain, route_class=APIRoute)
