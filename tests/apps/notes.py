"""What an application tells the test that started it, and the other way round, by files.

The application writes lines to the file that NOTES names; empty files beside it are the answers.
"""

from __future__ import annotations

import os
from pathlib import Path

import anyio

from lifekit.events import Event, OpenFailed, StopNoticed

NOTES = Path(os.environ["NOTES"])
POLL_SECONDS = 0.01
TURN_SECONDS = 0.03


def note(line: str) -> None:
    """Write a line."""
    with NOTES.open("a") as file:
        file.write(f"{line}\n")


def note_event(event: Event) -> None:
    """Write an event as its type and its resource; that of the notice comes amid anything."""
    if isinstance(event, StopNoticed):
        return
    words = [type(event).__name__, getattr(event, "resource", "")]
    if isinstance(event, OpenFailed) and event.error is None:
        words.append("cancelled")
    note(" ".join(filter(None, words)))


async def told(answer: str = "go", *, saying: str | None = None) -> None:
    """Wait for the file that is named like the *answer*, and write a line now and then."""
    while not NOTES.with_name(answer).exists():
        if saying is not None:
            note(saying)
        await anyio.sleep(POLL_SECONDS if saying is None else TURN_SECONDS)
