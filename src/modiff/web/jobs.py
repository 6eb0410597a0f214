"""Requests of several users: one at a time for each model, stopped by their user or when nobody waits for them."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from modiff.errors import StateError

PATIENCE = 10.0
"""Seconds after which a request ends that nobody follows any more: the tab was closed, or its network is gone."""
MOST = 32
"""Requests that run or wait at a time."""
PULSE = 1.0
"""Seconds after which a request says that it still lives, if there is nothing new."""


class Cancelled(BaseException):
    """The request was stopped. No Exception, so that nothing on the way takes it for a failure and goes on."""


class Job:
    """One request: a thread that works, what it shows meanwhile, and its result or error.

    view: what `show` was given last. ahead: how many requests for the same model come first. crowded: whether other
    models were at work at the same time, so that times mean little.
    """

    def __init__(self, jobs: "Jobs", work: Callable[["Job"], object]) -> None:
        self.view: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.ahead, self.crowded = 0, False
        self._jobs, self._work = jobs, work
        self._cancelled, self._done = threading.Event(), threading.Event()
        self._changed, self._seen = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="modiff request", daemon=True)

    @property
    def done(self) -> bool:
        """Whether its thread has ended."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Ask it to stop; it does at the next `check`."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise Cancelled in the thread of the job if it was stopped, or if nobody follows it."""
        if self._cancelled.is_set() or time.monotonic() - self._seen > PATIENCE:
            raise Cancelled

    def show(self, view: Any) -> None:
        """Let the follower see something new. Raises: Cancelled, as `check`."""
        self.check()
        self.view = view
        self._changed.set()

    @contextmanager
    def turn(self, model: Hashable) -> Iterator[None]:
        """Wait until no earlier request is at this model, and keep it in the body. Raises: Cancelled."""
        with self._jobs.turn(model, self):
            yield

    def follow(self, every: float = 0.2) -> Iterator["Job"]:
        """Yield the job whenever it shows something new, at least once in PULSE seconds, and once when it has ended.

        It ends when this iterator is closed, or not read for PATIENCE seconds.
        """
        try:
            while not self.done:
                self._seen = time.monotonic()
                yield self
                until = time.monotonic() + PULSE
                while time.monotonic() < until and not self.done:
                    self._seen = time.monotonic()
                    if self._changed.wait(every):
                        self._changed.clear()
                        self._done.wait(every)  # no more often than that
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
            self._done.set()
            self._changed.set()


class Jobs:
    """All requests of a server."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._lines: dict[Hashable, list[Job]] = {}
        self._owners: dict[str, Job] = {}

    def start(self, owner: str, work: Callable[[Job], object]) -> Job:
        """Begin a request; `owner` is the browser tab that it comes from.

        Raises: StateError if the tab has one that runs, or if there are MOST of them.
        """
        with self._condition:
            self._owners = {name: job for name, job in self._owners.items() if not job.done}
            if owner in self._owners:
                raise StateError("generate: expected one request a tab, got a second one. The first still runs. "
                                 "Stop it, or open another tab.")  # fmt: skip
            if len(self._owners) >= MOST:
                raise StateError(f"generate: expected at most {MOST} requests at a time, got one more. The server is "
                                 "busy. Try again in a minute.")  # fmt: skip
            job = self._owners[owner] = Job(self, work)
        job._thread.start()
        return job

    def stop(self, owner: str) -> None:
        """Cancel what runs or waits for a tab; nothing happens where nothing does."""
        with self._condition:
            if owner in self._owners:
                self._owners[owner].cancel()

    @contextmanager
    def turn(self, model: Hashable, job: Job) -> Iterator[None]:
        """As `Job.turn`: first come, first served, for each model."""
        with self._condition:
            line = self._lines.setdefault(model, [])
            line.append(job)
        try:
            with self._condition:
                while (ahead := line.index(job)) > 0:
                    job.ahead = ahead
                    job.check()
                    self._condition.wait(0.2)
                job.ahead = 0
                heads = [others[0] for others in self._lines.values() if others]
                for head in heads if len(heads) > 1 else ():
                    head.crowded = True
            yield
        finally:
            with self._condition:
                line.remove(job)
                if not line and self._lines.get(model) is line:
                    del self._lines[model]
                self._condition.notify_all()
