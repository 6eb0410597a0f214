"""Variants in processes of their own: they take turns, have their time and their memory, and cannot harm each other."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from loop import report as loop_report
from loop import rounds as loop_rounds
from loop.rounds import Run
from tests.bench.loop import stub as loop_stub


@pytest.fixture
def stubs(monkeypatch):
    """Run variants in stub processes. Returns: (records by name, the run, its lines)."""
    monkeypatch.setattr(loop_rounds, "serve", loop_stub.serve)
    monkeypatch.setattr(loop_rounds, "REFERENCE", "works-1")

    def run(*variants: str, rounds: int = 3, limit: float = 20, free: float | None = None) -> Any:
        lines: list[str] = []
        found = Run(rounds, limit, {"MODIFF_LOOP": "given"}, lines.append, lambda: free)
        tasks: Any = [loop_stub.task(variant) for variant in variants]
        records = found.all(tasks, cast(Any, loop_stub.task("works-1")))
        return {r.task.variant: r for r in records}, found, lines

    return run


def test_variants_take_turns_and_one_that_dies_harms_no_other(stubs, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    records, run, lines = stubs("works-1", "dies", "refuses", "works-2", "dies-later")
    assert [len(r.rounds) for r in records.values()] == [3, 0, 0, 3, 1]
    assert records["dies"].reason == "its process died, exit code 9"
    assert records["dies-later"].reason == "its process died, exit code 7"
    assert records["refuses"].reason == "no such thing here"
    assert run.reference == "works-1"
    spans = sorted((*r["span"], name) for name, record in records.items() for r in record.rounds)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "one at a time"
    assert [name[-1] for *_, name in spans] == ["1", "2", "r", "2", "1", "1", "2"], "each round begins with another"
    one, two = (records[name].facts["variables"] for name in ("works-1", "works-2"))
    assert one["MODIFF_LOOP"] == two["MODIFF_LOOP"] == "given"
    assert one["TORCHINDUCTOR_CACHE_DIR"] != two["TORCHINDUCTOR_CACHE_DIR"], "a compile cache each"
    assert "stub dies: its process died, exit code 9" in lines


def test_what_does_not_fit_into_memory_waits_and_the_first_runs_again(stubs):
    records, _, lines = stubs("works-1", "works-2", "works-3", rounds=2, free=110.0)
    assert records["works-1"].waves == [0, 0, 1, 1, 2, 2]
    assert (records["works-2"].waves, records["works-3"].waves) == ([1, 1], [2, 2])
    assert loop_report.drift(records["works-1"])[1] == "works-1, wave 3: 1.00x its time in wave 1"
    assert any("110 MiB of memory are left" in line for line in lines)
