"""Say random things to the gateway, other ones each time, for as long as is wanted.

python -m tests.sandbox.postgres.fuzz [--seconds 60]
"""

from __future__ import annotations

from argparse import ArgumentParser
from time import monotonic

from hypothesis import given, settings

from .test_bytes import Step, many, run, steps


def main() -> None:
    """Run until the time is over, or something breaks the gateway."""
    parser = ArgumentParser(description=__doc__, usage=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    until = monotonic() + parser.parse_args().seconds
    rounds = 0

    @settings(many, max_examples=1000)
    @given(steps)
    def says(told: list[Step]) -> None:
        run(told)

    while monotonic() < until:
        says()
        rounds += 1
        print(f"{rounds * 1000} conversations, and the gateway stands", flush=True)


if __name__ == "__main__":
    main()
