"""The same job on Ray: against a stand-in with the same interface, and on the real one where it is installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modiff.errors import ConfigError, StateError
from modiff.files import LOCK
from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.on_ray import RayEngine
from modiff.generate.run import LocalEngine, run_job
from modiff.generate.shards import Span
from modiff.generate.worker import DrawnSpan
from tests.generate.fakes import FakeEngine
from tests.pixels import saved_pipeline

ROOT = Path(__file__).parents[2]


class RayError(Exception):
    """As ray.exceptions.RayError."""


class RayTaskError(RayError):
    """As ray.exceptions.RayTaskError: a task raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback\nin many lines")
        self.cause = cause


class StandIn:
    """What RayEngine uses of ray. Tasks run when they are waited for, the last one first."""

    def __init__(self, resources: dict[str, float] | None = None) -> None:
        self.resources = {"CPU": 4.0} if resources is None else resources
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.calls: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.running: list[Any] = []
        self.most = 0
        self.up = False

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

        def decorate(function: Callable[..., Any]) -> Any:
            def start(*arguments: Any) -> SimpleNamespace:
                task = Task(function, arguments)
                self.running.append(task)
                self.most = max(self.most, len(self.running))
                return task

            return SimpleNamespace(remote=start)

        return decorate

    def wait(self, tasks: list[Any], *, num_returns: int) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        return tasks[-1:], tasks[:-1]

    def get(self, task: Any) -> Any:
        self.running.remove(task)
        try:
            return task.function(*task.arguments)
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error

    def cancel(self, task: Any, *, force: bool) -> None:
        self.calls.append(f"cancel {force}")
        self.running.remove(task)


class Task:
    """A call that was not made yet; equal to itself only, as an ObjectRef."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Ray, and a worker without a model, in place of the real ones."""
    found = StandIn()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(worker, "describe", FakeEngine().describe)
    return found


def draw(job: Job, batch_size: int, span: Span) -> DrawnSpan:
    return next(FakeEngine().draw(job, batch_size, [span], lambda images: None))


def job(**changes: Any) -> Job:
    return Job(**{"model": "fake", "num_images": 11, "batch_size": 2, "shard_size": 2} | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_the_folder_is_that_of_one_process_whatever_the_number_of_workers(
    tmp_path: Path, ray: StandIn, workers: int | None
) -> None:
    run_job(job(), tmp_path / "ray", engine=RayEngine(workers=workers, task=draw))
    run_job(job(), tmp_path / "local", engine=FakeEngine())
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert ray.most == (workers or 4)
    assert ray.calls == ["shutdown"]
    assert ray.settings["address"] == "local"
    assert ray.settings.get("num_cpus") == workers


@pytest.mark.parametrize(
    ("changes", "resources", "options"),
    [
        ({"threads": 2}, {"CPU": 4.0}, {"num_cpus": 2, "num_gpus": 0}),
        ({"device": "cuda"}, {"CPU": 16.0, "GPU": 2.0}, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_every_task_is_tried_again_and_takes_its_threads_or_its_gpu(
    tmp_path: Path, ray: StandIn, changes: dict[str, Any], resources: dict[str, float], options: dict[str, int]
) -> None:
    ray.resources = resources
    run_job(job(**changes), tmp_path, engine=RayEngine(task=draw))
    assert ray.options == [options | {"max_retries": 3, "retry_exceptions": False}] * 2
    assert ray.most == 2


def test_a_model_in_a_folder_is_found_from_any_working_directory(
    tmp_path: Path, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    seen: list[Job] = []

    def noted(job: Job, batch_size: int, span: Span) -> DrawnSpan:
        seen.append(job)
        return draw(job, batch_size, span)

    run_job(job(num_images=2, model="model"), tmp_path / "out", engine=RayEngine(task=noted))
    (tmp_path / "embedded").mkdir()  # the name counts: a folder must not take its place
    run_job(job(num_images=2, model="embedded"), tmp_path / "out2", engine=RayEngine(task=noted))
    assert [asked.model for asked in seen] == [str(tmp_path / "model"), "embedded"]
    assert {asked.threads for asked in seen} == {1}


def test_a_cluster_that_was_there_before_stays_and_an_address_is_joined_as_it_is(tmp_path: Path, ray: StandIn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        run_job(job(), tmp_path / "a", engine=RayEngine(address=address, workers=2, task=draw))
    assert ray.settings["address"] == address
    assert "num_cpus" not in ray.settings
    ray.up, ray.calls = True, []
    run_job(job(), tmp_path / "b", engine=RayEngine(task=draw))
    assert ray.calls == []


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_a_clear_error(tmp_path: Path, ray: StandIn, address: str) -> None:
    with pytest.raises(ConfigError, match=f"--address: expected a Ray cluster at {address}, got .*(refused|instance)"):
        run_job(job(), tmp_path, engine=RayEngine(address=address, task=draw))
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 5}, "expected a machine with 5 CPU for a worker, got 4 at most.*Use --threads 4"),
        ({"device": "cuda"}, "expected a machine with 1 GPU for a worker, got 0 at most.*Use --device cpu"),
        ({"device": "cuda:1"}, "--device: expected cpu or cuda with --engine ray, got cuda:1"),
    ],
)
def test_a_job_that_no_machine_can_run_is_an_error_and_not_a_wait(
    tmp_path: Path, ray: StandIn, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_job(job(**changes), tmp_path, engine=RayEngine(task=draw))
    assert ray.calls == ["shutdown"]


def test_an_error_of_ours_in_a_task_comes_back_as_it_is_and_stops_the_others(tmp_path: Path, ray: StandIn) -> None:
    def failing(job: Job, batch_size: int, span: Span) -> DrawnSpan:
        if span.first == 4:
            raise StateError("image 4: expected finite pixels")
        return draw(job, batch_size, span)

    with pytest.raises(StateError, match=r"^image 4: expected finite pixels$"):
        run_job(job(), tmp_path, engine=RayEngine(workers=3, task=failing))
    assert ray.calls == ["cancel True", "cancel True", "shutdown"]
    fake = FakeEngine()
    run_job(job(), tmp_path, engine=fake)
    assert 4 in {span.first for span in fake.drawn}


@pytest.mark.parametrize(
    ("raised", "caught", "message"),
    [
        (ZeroDivisionError(), RayTaskError, "traceback"),
        (RayError("WorkerCrashed"), StateError, "expected a worker that lives, got RayError after 3 retries"),
    ],
)
def test_a_bug_keeps_its_traceback_and_workers_that_die_again_and_again_are_a_clear_error(
    tmp_path: Path, ray: StandIn, raised: Exception, caught: type[Exception], message: str
) -> None:
    def failing(job: Job, batch_size: int, span: Span) -> DrawnSpan:
        raise raised

    with pytest.raises(caught, match=message):
        run_job(job(), tmp_path, engine=RayEngine(task=failing))


def test_workers_are_counted_from_one_and_without_ray_it_says_what_to_install(
    ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--workers: expected 1 or more, got 0"):
        RayEngine(workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"got none\. It is an extra\. Install it with pip install 'modiff\[ray\]'"):
        RayEngine()


real = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def whole(model: Path, folder: Path, num_images: int) -> dict[str, bytes]:
    asked = Job(model=str(model), num_images=num_images, steps=2, batch_size=2, shard_size=2, threads=1)
    run_job(asked, folder, engine=LocalEngine())
    return content(folder)


@real
def test_a_worker_dies_and_the_job_goes_on_then_the_driver_is_killed_and_another_goes_on_without_ray(
    tmp_path: Path,
) -> None:
    model, out, marker = saved_pipeline(tmp_path / "model"), tmp_path / "out", tmp_path / "marker"
    command = [sys.executable, "-m", "tests.generate.ray_scripts", str(model), str(out), str(marker)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 150
    while not (out / "shard-000002.safetensors").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    there = len(list(out.glob("shard-*")))
    assert there >= 3
    assert marker.exists()
    asked = Job(model=str(model), num_images=2 * there + 2, steps=2, threads=1)
    assert run_job(asked, out).kept == 2 * there
    assert content(out) == whole(model, tmp_path / "whole", 2 * there + 2)
