"""The engine that is a Ray cluster: every span a task, tried again on another worker when its worker dies."""

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from modiff.assets import MODELS
from modiff.config import check
from modiff.errors import ConfigError, ModiffError, StateError
from modiff.generate import worker
from modiff.generate.job import Job, check_counts
from modiff.generate.run import LocalEngine
from modiff.generate.shards import Span
from modiff.generate.worker import Description, DrawnSpan

RETRIES = 3


class RayEngine(LocalEngine):
    """Workers of a Ray cluster. They need modiff and the model under the same name, but not the output folder.

    A span is a pure function of the job: Ray may run it again. This process alone writes.
    """

    def __init__(self, *, address: str | None = None, workers: int | None = None) -> None:
        """Remember where to work; nothing is started before a job is described.

        address: of a running cluster, as `ray.init` takes it; None starts one here and stops it at the end.
        workers: spans drawn at a time; None for the number of processors, or of GPUs for a CUDA device.
        Raises: ConfigError without the package ray, or for less than one worker.
        """
        check_counts({"workers": workers}, 0)
        try:
            import ray  # an extra, and slow to import
        except ImportError as error:
            raise ConfigError(
                "engine: expected the package ray, got none. It is an extra. Install it with "
                "pip install 'modiff[ray]', or leave `engine` out."
            ) from error
        self._ray: Any = ray
        self._address, self._workers, self._ours = address or "local", workers, not ray.is_initialized()

    def close(self) -> None:
        """Stop the cluster, unless it was there before."""
        if self._ours:
            self._ray.shutdown()

    def describe(self, job: Job) -> Description:
        """As here, on a worker. Raises: ConfigError if no machine can run the job."""
        self._connect(job)
        return self._result(self._remote(worker.describe, job)())

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        """As here. Raises: StateError if a span killed every worker it had."""
        draw = self._remote(worker.draw_span, job)
        kind, need = _need(job)
        most = self._workers or max(1, int(self._ray.cluster_resources().get(kind, 0) / need))
        waiting = iter(spans)
        running = {draw(batch_size, span): span for span in islice(waiting, most)}
        try:
            while running:
                (done,), _ = self._ray.wait(list(running), num_returns=1)
                span, drawn = running.pop(done), self._result(done)
                running |= {draw(batch_size, after): after for after in islice(waiting, 1)}
                tick(span.count)
                yield drawn
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)

    def _remote(self, function: Callable[..., Any], job: Job) -> Callable[..., Any]:
        """Starts `function` on a worker with the job, said so that any working directory understands it."""
        folder, threads = Path(job.model).expanduser(), job.threads or 1
        local = job.model not in MODELS and folder.is_dir()  # a model of the package has its name there too
        there = dataclasses.replace(job, model=str(folder.resolve()) if local else job.model, threads=threads)
        resources = {"num_cpus": threads, "num_gpus": int(_need(job)[0] == "GPU")}
        task = self._ray.remote(**resources, max_retries=RETRIES, retry_exceptions=False)(function)
        return partial(task.remote, there)

    def _connect(self, job: Job) -> None:
        """Start or reach the cluster, and see that a machine of it can take a task: Ray would wait forever."""
        if not self._ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cpus = None if self._workers is None else self._workers * (job.threads or 1)
            new = {"include_dashboard": False, "num_cpus": cpus} if self._address == "local" else {}
            host, colon, port = self._address.removeprefix("ray://").rpartition(":")
            try:
                if colon and port.isdecimal():  # if nobody listens there, Ray itself would try for minutes
                    socket.create_connection((host, int(port)), timeout=10).close()
                self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **new)
            except (OSError, RuntimeError, ValueError) as error:
                reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise ConfigError(
                    f"address: expected a Ray cluster at {self._address}, got {reason.rstrip('.')}. It does "
                    "not answer, or runs another version. Check it with ray status, or leave `address` out."
                ) from error
        why = "Ray gives every worker a GPU of its own. Use device='cuda'."
        check("device", job.device, ":" not in job.device, "cpu or cuda with Ray", why)
        kind, need = _need(job)
        most = max((node["Resources"].get(kind, 0) for node in self._ray.nodes() if node["Alive"]), default=0)
        remedy = "device='cpu'" if kind == "GPU" else f"threads={max(1, int(most))}"
        why = f"No worker could start. Use {remedy}."
        check("engine", most, most >= need, f"a machine with {need} {kind} for a worker", why)

    def _result(self, reference: Any) -> Any:
        """What a task returned, or raised, or that its workers died."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ModiffError):
                raise error.cause from error
            raise
        except errors.RayError as error:
            raise StateError(
                f"engine: expected a worker that lives, got {type(error).__name__} after {RETRIES} retries. It "
                "ran out of memory or its machine is gone. Use a smaller `batch_size` or fewer `workers`, and run the "
                "command again: it goes on where it stopped."
            ) from error


def _need(job: Job) -> tuple[str, int]:
    """What a worker takes of a machine."""
    return ("GPU", 1) if job.device.startswith("cuda") else ("CPU", job.threads or 1)
