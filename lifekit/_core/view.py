"""What can be asked of a run: how it went, who is open, how long something may take, where it stands.

Nothing here changes the state of a run, which is `engine.py`'s to do.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from lifekit._util.call_sites import suspended_frames, waiting_at

from .deadlines import BLOCKED, Deadlines
from .errors import CrashError, DeadlineError, Failure, LifekitError, ShutdownError, StartupError
from .node import RUNNING, Node, State, Variables
from .plan import Plan
from .resource import Resource
from .timeline import Timeline, timeline
from .value import reached_in
from .worker import OnCrash, Worker

if TYPE_CHECKING:
    from .drivers import Sandbox  # of the values that it tells of

T = TypeVar("T")
NOWHERE: tuple[str, ...] = ()
_NO_WORD = "{name}: a scope that it holds was cancelled while it was open, and nothing says why"
Times = list[tuple[float | None, float | None]]


class View:
    """One run as it can be looked at."""

    name: str
    plan: Plan
    nodes: list[Node]
    own: list[Node]
    crew: set[Resource[Any]]
    absent: list[Node]
    values: dict[Resource[Any], Any]
    time: Deadlines
    now: Callable[[], float]
    start_timeout: float
    close_timeout: float
    grace: float
    on_crash: OnCrash
    stopping: bool
    open_failures: list[Failure]
    cut_off: list[str]
    """What was opening still when something else failed."""
    close_failures: list[Failure]
    began: float
    stop_began: float
    lost_before_stop: float
    start_times: Times | None = None  # since others stand for its resources

    def interrupt(self, error: BaseException) -> None:
        """End the application, and deliver *error* then."""
        raise NotImplementedError

    def replaced(self) -> set[Resource[Any]]:
        """Return the resources that something else stands in for."""
        pairs = zip(self.plan.resources, self.plan.declarations, strict=True)
        return {resource for resource, declaration in pairs if declaration is not resource}

    def start_timeline(self) -> Timeline:
        """Return how the start went."""
        times = self.start_times or self.opening_times()
        title, parents = f"start of {self.name}", self.plan.parents
        workers = {node.index for node in self.nodes if node.worker is not None}
        return timeline(title, self._names, times, parents, self.began, behind=workers)

    def opening_times(self) -> Times:
        """Return when each began to open, and when it was open; of workers when they began."""
        return [(node.open_began, node.opened_at) for node in self.nodes]

    def stop_timeline(self) -> Timeline:
        """Return how the stop went."""
        times = [(node.close_began, node.closed_at) for node in self.nodes]
        # What failed to open was closed before the stop that it caused.
        began = min([self.stop_began, *(begin for begin, _ in times if begin is not None)])
        title = f"stop of {self.name}"
        return timeline(title, self._names, times, self.plan.children, began, last_first=True)

    def failure(self, crashes: list[Failure]) -> StartupError | ShutdownError | CrashError | None:
        """Return the error that tells of all that failed."""
        name = self.name
        shutdown = ShutdownError.of(name, self.close_failures) if self.close_failures else None
        if not self.open_failures:
            return CrashError.of(name, crashes, shutdown) if crashes else shutdown
        return StartupError.of(
            name,
            self.open_failures,
            opened=self.opened(),
            cut_off=self.cut_off,
            not_begun=self.not_begun(),
            rollback=shutdown,
        )

    def opened(self) -> list[str]:
        """Return the names of what had opened."""
        return [node.resource.name for node in self.own if node.asked]

    def not_begun(self) -> list[str]:
        """Return the names of what never began to open."""
        return [node.resource.name for node in self.own if node.state is State.WAITING]

    def left(self) -> str:
        """Return the names of what is not closed yet."""
        return ", ".join(node.resource.name for node in self.own if node.state in RUNNING)

    def sandboxes(self) -> list[tuple[str, Sandbox]]:
        """Return the names and sandboxes of the open values that have one, what others need first."""
        return [
            (node.resource.name, node.live.sandbox)
            for node in sorted(self.own, key=lambda node: node.opened_at or inf)
            if node.state is State.OPEN and node.live is not None and node.live.sandbox is not None
        ]

    @property
    def _names(self) -> list[str]:
        return [resource.name for resource in self.plan.resources]

    @property
    def variables(self) -> Variables:
        """What factories set in their contexts, of those that set the same the last declared."""
        return tuple(each for node in self.nodes for each in node.variables)

    def deadline_error(self, node: Node, *, abandoned: bool = False) -> DeadlineError:
        """Return the error of a resource whose time is up, with where it stands."""
        cut_short = node.phase != "terminate" and node.armed_for < self.timeout(node)
        blocked = node.blocked - node.blocked_before
        return DeadlineError(
            resource=node.resource.name,
            location=node.declaration.location,
            phase=node.phase,
            seconds=node.armed_for,
            grace=self.grace if self.stopping and cut_short else None,
            stack=self.stands_at(node),
            holders=node.live.holders() if node.live is not None else (),
            opening=self._if_known("", self._reached_by, node),
            blocked=blocked if blocked >= BLOCKED else 0.0,
            abandoned=abandoned,
        )

    def _if_known(self, default: T, look: Callable[[Node], T], node: Node) -> T:
        # It looks at frames and at what stands in them, which may be broken in any way.
        try:
            return look(node)
        except Exception:
            return default
        except BaseException as error:
            self.interrupt(error)
            return default

    def _reached_by(self, node: Node) -> str:
        if node.live is None or node.phase not in ("open", "check"):
            return ""
        if node.live.driver is not None:
            return node.live.describe()
        needs = [node.values.get(need) for need in node.declaration.needs]
        return reached_in(suspended_frames(node.coroutine), needs)

    def start_seconds(self, node: Node) -> float:
        """Return the seconds that its opening has."""
        declared = node.declaration.options.start_timeout
        return self.start_timeout if declared is None else declared

    def close_seconds(self, node: Node, seconds: float | None = None) -> float:
        """Return the seconds that its closing has, or else *seconds*, were it to begin now."""
        seconds = self.timeout(node) if seconds is None else seconds
        if self.stopping:
            lost = self.time.lost - self.lost_before_stop
            seconds = min(seconds, max(0.0, self.stop_began + self.grace + lost - self.now()))
        return seconds

    def timeout(self, node: Node) -> float:
        """Return the seconds that its closing has by itself."""
        declared = node.declaration.options.close_timeout
        return self.close_timeout if declared is None else declared

    def crash_rule(self, node: Node) -> OnCrash:
        """Return what its crash does."""
        declared = node.declaration
        return declared.rules.on_crash if isinstance(declared, Worker) else self.on_crash

    def has_crashed(self) -> bool:
        """Return whether something is dead that its declaration does not go on without."""
        dead = (node for node in self.own if node.crashed and not node.rests)
        return any(self.crash_rule(node) != "ignore" for node in dead)

    def died_in_block(self) -> list[Failure]:
        """Return what has died since it was asked last, and says why only when it closes."""
        died = [
            node for node in self.own if node.crashed and node.state is State.OPEN and not node.told
        ]
        for node in died:
            node.told = True
        return [
            (node.resource.name, node.declaration.location, self.no_word(node))
            for node in died
            if self.on_crash == "stop"
        ]

    def no_word(self, node: Node) -> LifekitError:
        """Return the error for what crashed, and does not say of what."""
        return LifekitError(_NO_WORD.format(name=node.resource.name))

    def stands_at(self, node: Node) -> tuple[str, ...]:
        """Return the lines where its task stands, as far as they can be known."""
        return self._if_known(NOWHERE, lambda node: waiting_at(node.coroutine), node)
