"""Requests of several users: one at a time for each model, stopped by their user or when nobody waits for them."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from modiff.errors import StateError

PULSE, PATIENCE, MOST = 1.0, 10.0, 32
"""Seconds after which a request says that it lives; after which one ends that nobody follows; requests at a time."""


class Cancelled(BaseException):
    """The request was stopped. No Exception, so that nothing on the way takes it for a failure and goes on."""


class Request:
    """One request: a thread that works, what it shows meanwhile, and its result or error.

    ahead: how many requests for the same model come first. crowded: other models were at work at the same time.
    """

    def __init__(self, jobs: "Jobs", work: Callable[["Request"], object]) -> None:
        self.view: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.ahead, self.crowded = 0, False
        self._jobs, self._work = jobs, work
        self.done = self.stopping = False
        self._changed, self._seen = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="modiff request", daemon=True)

    def cancel(self) -> None:
        """Ask it to stop; it does at the next `check`."""
        self.stopping = True

    def check(self) -> None:
        """Raise Cancelled in the thread of the job if it was stopped, or if nobody follows it."""
        if self.stopping or time.monotonic() - self._seen > PATIENCE:
            raise Cancelled

    def show(self, view: Any) -> None:
        """Let the follower see something new. Raises: as `check`."""
        self.check()
        self.view = view
        self._changed.set()

    @contextmanager
    def turn(self, model: Hashable) -> Iterator[None]:
        """Wait until no earlier request is at this model, and keep it in the body. Raises: Cancelled."""
        condition, lines = self._jobs.condition, self._jobs.lines
        with condition:
            line = lines.setdefault(model, [])
            line.append(self)
        try:
            with condition:
                while (ahead := line.index(self)) > 0:
                    self.ahead = ahead
                    self.check()
                    condition.wait(0.2)
                self.ahead = 0
                heads = [others[0] for others in lines.values()]
                for head in heads if len(heads) > 1 else ():
                    head.crowded = True
            yield
        finally:
            with condition:
                line.remove(self)
                if not line:
                    del lines[model]
                condition.notify_all()

    def follow(self, every: float = 0.2) -> Iterator["Request"]:
        """Yield the job whenever it shows something new, once in PULSE seconds, and at its end; closed, it ends.

        A stopped one is followed for another pulse: a compilation goes on to its end, and nobody has to wait for it.
        """
        pulses = 1
        try:
            while not self.done and pulses:
                pulses -= self.stopping
                self._seen = time.monotonic()
                yield self
                until = time.monotonic() + PULSE
                while time.monotonic() < until and not self.done:
                    self._seen = time.monotonic()
                    if self._changed.wait(every):
                        self._changed.clear()
                        time.sleep(every / 2)  # no more often than that
                        break
            yield self
        finally:
            self.cancel()

    def _run(self) -> None:
        try:
            self.result = self._work(self)
        except BaseException as error:  # shown to its user; the server goes on
            self.error = error
        finally:
            self.done = True
            self._changed.set()


class Jobs:
    """All requests of a server. lines: of each model, the request that is at it, and those that wait."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.lines: dict[Hashable, list[Request]] = {}
        self._owners: dict[str, Request] = {}

    def start(self, owner: str, work: Callable[[Request], object]) -> Request:
        """Begin a request of a browser tab. Raises: StateError if the tab has one that nobody stopped, or at MOST."""
        with self.condition:
            self._owners = {name: job for name, job in self._owners.items() if not (job.done or job.stopping)}
            if owner in self._owners:
                raise StateError("generate: expected one request a tab, got a second one. The first still runs. "
                                 "Stop it, or open another tab.")  # fmt: skip
            if len(self._owners) >= MOST:
                raise StateError(f"generate: expected at most {MOST} requests at a time, got one more. The server is "
                                 "busy. Try again in a minute.")  # fmt: skip
            job = self._owners[owner] = Request(self, work)
        job._thread.start()
        return job

    def stop(self, owner: str) -> None:
        """Cancel what runs or waits for a tab; nothing happens where nothing does."""
        with self.condition:
            if owner in self._owners:
                self._owners[owner].cancel()
