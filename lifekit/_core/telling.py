"""How the events of one run reach the log and who listens to them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from lifekit import events

from .deadlines import BLOCKED, WORTH_SAYING, Deadlines
from .stand_in import redact_error

if TYPE_CHECKING:
    from .lifespan import Lifespan  # which its events name


class Teller:
    """Tells of the events of one run, which goes on whatever a listener or a logging handler raises."""

    def __init__(
        self,
        registry: str,
        lifespan: Lifespan,
        listener: Callable[[events.Event], object] | None,
        time: Deadlines,
        interrupt: Callable[[BaseException], None],
    ) -> None:
        """*interrupt* gets what is no Exception, such as KeyboardInterrupt."""
        self.heard = listener is not None or events.logger.isEnabledFor(logging.INFO)
        """Whether anybody wants to know of more than failures."""
        self._registry, self._lifespan = registry, lifespan
        self._listener, self._time, self._interrupt = listener, time, interrupt

    def tell(self, kind: Callable[..., events.Event], *told: object) -> None:
        """Tell of one event."""
        try:
            event = kind(self._registry, *told, lifespan=self._lifespan)
            events.log(event)
            if self._listener is not None:
                began = self._time.now()
                self._listener(event)
                self._blocked_by_listener(self._time.now() - began)
        except Exception as error:
            line = f"on_event of {self._registry} failed at {kind.__name__}"
            with suppress(Exception):
                events.logger.error(line, exc_info=redact_error(error))
        except BaseException as error:
            self._interrupt(error)

    def _blocked_by_listener(self, seconds: float) -> None:
        if seconds >= BLOCKED:
            self._time.lost += seconds
        if seconds >= WORTH_SAYING:
            events.logger.warning(
                f"on_event of {self._registry} blocked the event loop for {seconds:.2f} s"
            )
