"""The same job on Ray: against a stand-in with the same interface, and on the real one where it is installed."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modiff.errors import ConfigError, StateError
from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.on_ray import RayEngine
from modiff.generate.run import run_job
from modiff.generate.shards import Span
from modiff.generate.worker import DrawnSpan
from tests.generate.fakes import FakeEngine, fake_job
from tests.kills import content

ROOT = Path(__file__).parents[2]


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback\nin many lines")
        self.cause = cause


class StandIn:
    """What RayEngine uses of ray. Tasks run when they are waited for, the last one first."""

    def __init__(self) -> None:
        self.resources: dict[str, float] = {"CPU": 4.0, "GPU": 2.0}
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.calls: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.running: list[Any] = []
        self.most, self.up = 0, False

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **settings: Any) -> None:
        if settings["address"] == "auto":
            raise ConnectionError("Could not find any running Ray instance.\nMore lines.")
        self.up, self.settings = True, settings

    def shutdown(self) -> None:
        self.up = False
        self.calls.append("shutdown")

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 8.0}}
        return [dead, {"Alive": True, "Resources": self.resources}]

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        self.options.append(options)

        def start(*call: Any) -> object:
            self.running.append(partial(*call))  # a call that was not made yet; equal to itself only, as an ObjectRef
            self.most = max(self.most, len(self.running))
            return self.running[-1]

        return lambda function: SimpleNamespace(remote=partial(start, function))

    def wait(self, tasks: list[Any], *, num_returns: int) -> tuple[list[Any], list[Any]]:
        return tasks[-1:], tasks[:-1]

    def get(self, task: Any) -> Any:
        self.running.remove(task)
        try:
            return task()
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error

    def cancel(self, task: Any, *, force: bool) -> None:
        self.calls.append(f"cancel {force}")
        self.running.remove(task)


def draw(job: Job, batch_size: int, span: Span) -> DrawnSpan:
    return next(FakeEngine().draw(job, batch_size, [span], lambda images: None))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    ray = StandIn()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(worker, "describe", FakeEngine().describe)
    monkeypatch.setattr(worker, "draw_span", draw)
    return ray


def job(**changes: Any) -> Job:
    return fake_job(**{"shard_size": 2} | changes)


@pytest.mark.parametrize(
    ("workers", "changes", "at_once", "cpus", "gpus"),
    [(None, {}, 4, 1, 0), (3, {}, 3, 1, 0), (None, {"threads": 2}, 2, 2, 0), (None, {"device": "cuda"}, 2, 1, 1)],
)
def test_the_folder_is_that_of_one_process_and_every_task_takes_its_threads_or_its_gpu_and_is_tried_again(
    tmp_path: Path, ray: StandIn, workers: int | None, changes: dict[str, Any], at_once: int, cpus: int, gpus: int
) -> None:
    run_job(job(**changes), tmp_path / "ray", engine=RayEngine(workers=workers))
    run_job(job(**changes), tmp_path / "local", engine=FakeEngine())
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert (ray.most, ray.calls) == (at_once, ["shutdown"])
    assert (ray.settings["address"], ray.settings["num_cpus"]) == ("local", workers)
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 3, "retry_exceptions": False}
    assert ray.options == [options] * 2


def test_a_model_in_a_folder_is_read_from_any_working_directory(
    tmp_path: Path, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[str, int | None]] = []
    monkeypatch.setattr(
        worker, "draw_span", lambda job, *rest: (seen.append((job.model, job.threads)), draw(job, *rest))[1]
    )
    for name in ("model", "embedded"):  # of the package: a folder must not count instead
        (tmp_path / name).mkdir()
        run_job(job(num_images=2, model=name), tmp_path / f"out-{name}", engine=RayEngine())
    assert seen == [(str(tmp_path / "model"), 1), ("embedded", 1)]


def test_a_cluster_that_was_there_before_stays_and_an_address_is_joined_as_it_is(tmp_path: Path, ray: StandIn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        run_job(job(), tmp_path / "a", engine=RayEngine(address=address, workers=2))
    assert (ray.settings["address"], ray.settings.get("num_cpus")) == (address, None)
    ray.up, ray.calls = True, []
    run_job(job(), tmp_path / "b", engine=RayEngine())
    assert ray.calls == []


@pytest.mark.parametrize(
    ("address", "changes", "message"),
    [
        ("auto", {}, "address: expected a Ray cluster at auto, got .*instance"),
        ("ray://127.0.0.1:1", {}, "address: expected a Ray cluster at ray://127.0.0.1:1, got .*refused"),
        (None, {"threads": 5}, "expected a machine with 5 CPU for a worker, got 4.0. No worker.*Use threads=4"),
        (None, {"device": "cuda"}, "expected a machine with 1 GPU for a worker, got 0. No worker.*Use device='cpu'"),
        (None, {"device": "cuda:1"}, "device: expected cpu or cuda with Ray, got 'cuda:1'"),
    ],
)
def test_a_job_that_no_machine_can_run_is_an_error_and_not_a_wait(
    tmp_path: Path, ray: StandIn, address: str | None, changes: dict[str, Any], message: str
) -> None:
    ray.resources = {"CPU": 4.0}
    with pytest.raises(ConfigError, match=message):
        run_job(job(**changes), tmp_path, engine=RayEngine(address=address))
    assert ray.calls == ["shutdown"]
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("raised", "caught", "message"),
    [
        (StateError("image 4: expected finite pixels"), StateError, r"^image 4: expected finite pixels$"),
        (ZeroDivisionError(), RayTaskError, "traceback"),
        (RayError("WorkerCrashed"), StateError, "expected a worker that lives, got RayError after 3 retries"),
    ],
)
def test_an_error_in_a_task_stops_the_others_and_is_a_clear_one_or_a_traceback_for_a_bug(
    tmp_path: Path, ray: StandIn, monkeypatch, raised: Exception, caught: type[Exception], message: str
) -> None:
    def failing(job: Job, batch_size: int, span: Span) -> DrawnSpan:
        if span.first == 4:
            raise raised
        return draw(job, batch_size, span)

    monkeypatch.setattr(worker, "draw_span", failing)
    with pytest.raises(caught, match=message):
        run_job(job(), tmp_path, engine=RayEngine(workers=3))
    assert ray.calls == ["cancel True", "cancel True", "shutdown"]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray")
def test_a_worker_dies_and_the_job_goes_on_then_the_driver_is_killed_and_another_goes_on_without_ray(
    model: Path, tmp_path: Path
) -> None:
    out, marker = tmp_path / "out", tmp_path / "marker"
    command = [sys.executable, "-m", "tests.generate.fakes", str(model), str(out), str(marker)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 150
    while not (out / "shard-000002.safetensors").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    there = len(list(out.glob("shard-*")))
    assert there >= 3
    assert marker.exists()
    more = Job(model=str(model), num_images=2 * there + 2, steps=2, threads=1, batch_size=2, shard_size=2)
    assert run_job(more, out).kept == 2 * there
    run_job(more, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
