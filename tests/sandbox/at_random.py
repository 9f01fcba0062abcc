"""Compare applications in production and in a sandbox, other ones each time, for as long as is wanted.

python -m tests.sandbox.at_random CLIENT [--seconds 600] [--seed 1]

CLIENT is the middle of a module's name: aiopg, asyncpg, engine, psycopg or sqlalchemy.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser
from importlib import import_module
from time import monotonic
from typing import Any

import anyio.from_thread
from hypothesis import given, seed, settings

from lifekit import embedded

from .differential import Op, calm, worlds_of


def main() -> None:
    """Run until the time is over, or something differs."""
    parser = ArgumentParser(description=__doc__, usage=__doc__)
    parser.add_argument("client")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    told = parser.parse_args()
    module: Any = import_module(f"{__package__}.test_{told.client}_stateful")
    until = monotonic() + told.seconds
    with anyio.from_thread.start_blocking_portal() as portal:
        server = embedded.postgres(settings={"autovacuum": "off"})
        with (
            portal.wrap_async_context_manager(server) as running,
            worlds_of(running, module.CLIENT) as worlds,
        ):
            number = told.seed
            while monotonic() < until:
                print(f"--seed {number}", flush=True)

                @seed(number)
                @settings(calm, max_examples=50)
                @given(module.sequences)
                def same(sequence: list[Op]) -> None:
                    worlds.compare(sequence)

                same()
                number += 1


if __name__ == "__main__":
    main()
