"""Requests: one at a time for each model in their order, stopped by their user, or when nobody follows them."""

import threading
import time
from collections.abc import Callable

import pytest

from modiff.errors import StateError
from modiff.web import jobs as module
from modiff.web import views
from modiff.web.jobs import Cancelled, Jobs, Request


def wait(event: threading.Event) -> None:
    assert event.wait(10)


def finished(job: Request) -> Request:
    return [*job.follow(0.01)][-1]


def until(holds: Callable[[], object]) -> None:
    while not holds():
        time.sleep(0.005)


def test_a_job_shows_what_is_new_and_ends_with_its_result() -> None:
    go = threading.Event()

    def work(job: Request) -> str:
        job.show("first")
        wait(go)
        return "made"

    views = []
    job = Jobs().start("tab", work)
    for each in job.follow(0.01):
        views.append(each.view)
        if each.view == "first":
            go.set()
    assert job.done
    assert (job.result, job.error) == ("made", None)
    assert "first" in views


def test_an_error_is_kept_for_its_user() -> None:
    assert isinstance(finished(Jobs().start("tab", lambda job: 1 / 0)).error, ZeroDivisionError)


def test_a_stop_ends_what_runs_and_an_exception_handler_on_the_way_does_not_swallow_it() -> None:
    def work(job: Request) -> None:
        try:
            until(job.check)
        except Exception:
            pytest.fail("it went on")

    jobs = Jobs()
    job = jobs.start("tab", work)
    jobs.stop("other tab")
    time.sleep(0.05)
    assert not job.done
    jobs.stop("tab")
    assert isinstance(finished(job).error, Cancelled)


def test_what_nobody_follows_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    job = Jobs().start("tab", lambda job: until(job.check))
    job._thread.join(10)
    assert isinstance(job.error, Cancelled)


def test_a_closed_iterator_ends_the_job() -> None:
    job = Jobs().start("tab", lambda job: until(job.check))
    following = job.follow(0.01)
    next(following)
    following.close()
    job._thread.join(10)
    assert isinstance(job.error, Cancelled)


def test_a_follower_that_sees_nothing_new_is_still_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PULSE", 0.05)
    following = Jobs().start("tab", lambda job: until(job.check)).follow(0.01)
    assert len({next(following) for _ in range(3)}) == 1
    following.close()


def test_a_tab_has_one_request_at_a_time_and_a_server_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    first = jobs.start("tab", lambda job: until(job.check))
    with pytest.raises(StateError, match="first still runs"):
        jobs.start("tab", lambda job: until(job.check))
    monkeypatch.setattr(module, "MOST", 1)
    with pytest.raises(StateError, match="busy"):
        jobs.start("another", lambda job: until(job.check))
    first.cancel()
    finished(first)
    second = jobs.start("another", lambda job: "made")
    assert finished(second).result == "made"


def test_one_at_a_time_for_a_model_in_the_order_of_arrival_and_others_at_once() -> None:
    jobs, order, go, busy = Jobs(), list[str](), threading.Event(), list[int]()

    def work(name: str, model: str, hold: bool = False):
        def run(job: Request) -> None:
            with job.turn(model):
                busy.append(1)
                assert len(busy) == 1 or model == "other"
                order.append(name)
                if hold:
                    wait(go)
                busy.pop()

        return run

    first = jobs.start("1", work("first", "model", hold=True))
    until(lambda: "first" in order)
    second = jobs.start("2", work("second", "model"))
    until(lambda: second.ahead == 1)
    third = jobs.start("3", work("third", "model"))
    other = jobs.start("4", work("other", "other"))
    assert finished(other).error is None
    assert first.crowded
    assert order == ["first", "other"]
    until(lambda: third.ahead == 2)
    go.set()
    assert [finished(job).error for job in (first, second, third)] == [None] * 3
    assert order[2:] == ["second", "third"]


def test_a_stop_while_waiting_gives_the_turn_to_the_next() -> None:
    jobs, go = Jobs(), threading.Event()

    def holding(job: Request) -> None:
        with job.turn("model"):
            wait(go)

    first = jobs.start("1", holding)
    until(lambda: "model" in jobs.lines)
    second, third = jobs.start("2", holding), jobs.start("3", holding)
    jobs.stop("2")
    assert isinstance(finished(second).error, Cancelled)
    go.set()
    assert [finished(job).error for job in (first, third)] == [None, None]
    assert jobs.lines == {}


def test_what_a_stop_cannot_interrupt_ends_alone_and_the_next_request_of_the_tab_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PULSE", 0.05)
    jobs, compiled = Jobs(), threading.Event()

    def compiling(job: Request) -> None:
        with job.turn("model"):
            wait(compiled)

    first = jobs.start("tab", compiling)
    until(lambda: "model" in jobs.lines)
    jobs.stop("tab")
    assert not finished(first).done
    assert "ends first" in views.stopped(first)
    second = jobs.start("tab", compiling)
    until(lambda: second.ahead == 1)
    compiled.set()
    assert finished(second).error is None
    assert "at once" in views.stopped(second)
