"""Whole loops, interleaved: every variant in a process of its own, one of them running while all others wait."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loop.child import serve
from loop.task import Task
from loop.variants import REFERENCE

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Set it to keep what is compiled for the next call; it gets a folder for each variant."""
SPARE = 1.25
"""Memory that must be free before another process starts, over the largest of its kind so far."""


@dataclass
class Record:
    """What is known of a variant. `reason`: why it did not run, or stopped. `rounds`: one result a loop."""

    task: Task
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    waves: list[int] = field(default_factory=list)
    used: float = 0.0

    def seconds(self, wave: int | None = None) -> list[float]:
        """Of its loops, or of those of one wave."""
        return [r["seconds"] for r, w in zip(self.rounds, self.waves, strict=True) if wave in (None, w)]


class Child:
    """The process of a variant. Its answers are waited for no longer than the variant's time limit."""

    def __init__(self, record: Record, environment: Mapping[str, str], limit: float) -> None:
        self.record, self.limit = record, limit
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, record.task), name=record.task.variant)
        with set_environment(environment):  # read once, when the child's libraries load
            self.process.start()
        theirs.close()

    def answer(self, expected: str) -> Any:
        """What it sends next; None if it did not, and the record then says why."""
        start = time.perf_counter()
        kind, value = "cannot", f"not done after {self.limit:.0f} s (--limit)"
        try:
            if self.connection.poll(max(0.0, self.limit - self.record.used)):
                kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            kind, value = "cannot", f"its process died, exit code {self.process.exitcode}"
        self.record.used += time.perf_counter() - start
        if kind == expected:
            return value
        self.record.reason = value
        return None

    def run(self) -> Any:
        """One loop; None if it failed."""
        try:
            self.connection.send("run")
        except OSError:
            pass  # it died meanwhile; the answer says so
        return self.answer("ran")

    def end(self) -> None:
        """End the process, gently if it listens."""
        if self.process.is_alive() and not self.record.reason:
            try:
                self.connection.send("end")
                self.process.join(10)
            except OSError:
                pass
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


@contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that are started in the body."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class Run:
    """All variants of one model. `say` prints a line of progress; `environment` is of the children."""

    rounds: int
    limit: float
    environment: Mapping[str, str]
    say: Callable[[str], None] = print
    available: Callable[[], float | None] = lambda: available_mib()
    device_free: Callable[[], float | None] = lambda: None
    reference: np.ndarray | None = None

    def all(self, tasks: list[Task], reference: Task) -> list[Record]:
        """A record each, in their order. `reference`: the float32 variant, run once and not listed if not among them.

        Variants that do not fit into memory together run in waves, the first one that ran in each of them: it tells
        whether the machine was as fast as before.
        """
        records = {task.variant: Record(task) for task in tasks}
        waiting, wave, anchor = list(records.values()), 0, None
        if reference.variant not in records:
            self._make_reference(reference)
        with tempfile.TemporaryDirectory(prefix="modiff-loop-") as folder:
            caches = Path(os.environ.get(CACHE, folder)) / (tasks[0].limit or "native") / tasks[0].model.name
            while waiting:
                taking_part: list[Record] = [anchor] if anchor else []
                waiting = self._wave(taking_part, waiting, wave, caches)
                anchor = anchor or next((r for r in taking_part if r.rounds and not r.reason), None)
                wave += 1
        return list(records.values())

    def _make_reference(self, task: Task) -> None:
        """The images that errors are measured against: one loop, not timed."""
        record = Record(task)
        child = Child(record, self.environment, self.limit)
        try:
            if child.answer("ready") is not None and (ran := child.run()) is not None:
                self.reference = ran["images"]
        finally:
            child.end()
        if record.reason:
            self.say(f"{task.model.name}: no reference, {record.reason}")

    def _wave(self, taking_part: list[Record], waiting: list[Record], wave: int, caches: Path) -> list[Record]:
        """Run as many as fit; `taking_part` grows by them. Returns: those still waiting."""
        children: list[Child] = []
        least = len(taking_part) + 1  # a wave of the anchor alone would be followed by another one, for ever
        waiting = [*taking_part, *waiting]
        taking_part.clear()
        try:
            while waiting and (len(taking_part) < least or not children or self._fits(children)):
                record = waiting.pop(0)
                taking_part.append(record)
                child = self._start(record, caches)
                if child is not None:
                    children.append(child)
            self._rounds(children, wave)
        finally:
            for child in children:
                child.end()
        return waiting

    def _start(self, record: Record, caches: Path) -> Child | None:
        """A child that is ready; it is ended if it cannot be. Each has a compile cache of its own."""
        task = record.task
        own = {CACHE: str(caches / task.variant)}
        child = Child(record, {**self.environment, **own}, self.limit)
        try:
            facts = child.answer("ready")
        except BaseException:
            child.end()
            raise
        if facts is None:
            child.end()
            self.say(f"{task.model.name} {task.variant}: {record.reason}")
            return None
        record.facts = facts
        self.say(f"{task.model.name} {task.variant}: ready, {record.used:.0f} s, {facts['peak_mib']:.0f} MiB")
        return child

    def _fits(self, children: list[Child]) -> bool:
        facts = [child.record.facts for child in children]
        for words, free, name in (
            ("", self.available(), "peak_mib"),
            (" of the GPU", self.device_free(), "device_mib"),
        ):
            if free is not None and free <= SPARE * max(f[name] for f in facts):
                self.say(f"{free:.0f} MiB of memory{words} are left: the other variants wait for a wave of their own")
                return False
        return True

    def _rounds(self, children: list[Child], wave: int) -> None:
        """Each round runs every child once and begins with another one: none always follows the same neighbour."""
        for i in range(self.rounds):
            first = i % max(1, len(children))
            for child in [*children[first:], *children[:first]]:
                record = child.record
                ran = None if record.reason else child.run()
                if ran is None:
                    continue
                if record.task.variant == REFERENCE and self.reference is None:
                    self.reference = ran["images"]
                record.rounds.append(ran)
                record.waves.append(wave)
                self.say(f"{record.task.model.name} {record.task.variant}: {ran['seconds']:.3f} s")


def gpu_mib() -> float:
    """Memory of the GPU that nobody took."""
    return torch.cuda.mem_get_info()[0] / 2**20


def available_mib() -> float | None:
    """Memory that may still be taken: of the machine, and of a control group's limit; None where nothing tells it."""
    free: list[float] = []
    table = Path("/proc/meminfo")
    if table.is_file():
        lines = [line.split() for line in table.read_text().splitlines()]
        free += [int(line[1]) / 2**10 for line in lines if line[0] == "MemAvailable:"]
    most, now = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if most.is_file() and now.is_file() and most.read_text().strip().isdigit():
        free.append((int(most.read_text()) - int(now.read_text())) / 2**20)
    return min(free, default=None)
